"""Kernels in Triton: products of a few rows with quantised weights, and laying a weight out in full.

`one_row` is bound by instructions before it is by memory, so it is careful with both. A 32-bit word of codes
is loaded once, and each code is put where a float32 keeps the upper bits of its fraction: with the exponent
of 128, four bits there mean 128 + code, and eight mean 128 + code / 2. That takes a shift and one logical
operation, where converting an integer takes a quarter of a processor's clock for each number. What was added
to all codes alike comes off again as a multiple of the sum of the row. (Kim et al., arXiv 2211.10017,
use the same trick in float16.)

`few_rows` lays tiles of the weight out in bfloat16 and lets the tensor cores add up in float32.

`exponent` is always 0x43000000. As a constant it would cost an instruction for each number: one of these
cannot hold both that and a mask.

Where Triton is not installed, or finds no C compiler for its launcher, nothing here is used.
"""

# Annotations are Triton's, which reads them when it compiles: there are no types of Python behind them.
# pyright: reportInvalidTypeForm=false, reportUnknownParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from importlib import import_module
from typing import Any

triton: Any = import_module("triton")
import_module("triton.testing")
tl: Any = import_module("triton.language")


def _one_row_int8(  # pragma: no cover -- compiled
    x: tl.tensor,  # (inputs / 4,) int64: bfloat16 by fours
    codes: tl.tensor,  # (outputs, inputs / 4) int32
    scales: tl.tensor,  # (outputs,)
    output: tl.tensor,  # (outputs,)
    outputs: tl.tensor,
    words: tl.tensor,  # of a row
    exponent: tl.tensor,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < outputs
    start = row.to(tl.int64)[:, None] * words
    place = tl.arange(0, WORDS)
    total = tl.zeros((ROWS, WORDS), tl.float32)
    sums = tl.zeros((WORDS,), tl.float32)
    for first in range(0, words, WORDS):
        at = first + place
        inside = at < words
        word = tl.load(codes + start + at[None, :], own[:, None] & inside[None, :], other=0)
        word = word ^ -2139062144  # 0x80808080: codes of -128 to 127 as 0 to 255
        four = tl.load(x + at, inside, other=0)
        low, high = four.to(tl.int32), (four >> 32).to(tl.int32)
        x0 = (low << 16).to(tl.float32, bitcast=True)
        x1 = (low & -65536).to(tl.float32, bitcast=True)
        x2 = (high << 16).to(tl.float32, bitcast=True)
        x3 = (high & -65536).to(tl.float32, bitcast=True)
        sums += (x0 + x1) + (x2 + x3)
        total += (((word << 15) & 0x7F8000) | exponent).to(tl.float32, bitcast=True) * x0[None, :]
        total += (((word << 7) & 0x7F8000) | exponent).to(tl.float32, bitcast=True) * x1[None, :]
        total += (((word >> 1) & 0x7F8000) | exponent).to(tl.float32, bitcast=True) * x2[None, :]
        total += (((word >> 9) & 0x7F8000) | exponent).to(tl.float32, bitcast=True) * x3[None, :]
    result = (2 * tl.sum(total, 1) - 384 * tl.sum(sums, 0)) * tl.load(scales + row, own, other=0.0)
    tl.store(output + row, result.to(output.dtype.element_ty), own)


def _one_row_4bit(  # pragma: no cover -- compiled
    x: tl.tensor,  # (inputs / 4,) int64: bfloat16 by fours
    codes: tl.tensor,  # (outputs, inputs / 8) int32
    scales: tl.tensor,  # (outputs, inputs / 32 / SHARED)
    table: tl.tensor,  # (16,) float32
    output: tl.tensor,  # (outputs,)
    outputs: tl.tensor,
    blocks: tl.tensor,  # of a row; 32 numbers each
    exponent: tl.tensor,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARED: tl.constexpr,  # blocks to a scale
    TABLE: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row < outputs
    start = row.to(tl.int64)[:, None] * blocks
    place = tl.arange(0, BLOCKS)
    word_of = tl.arange(0, 4)
    total = tl.zeros((ROWS, BLOCKS), tl.float32)
    for first in range(0, blocks, BLOCKS):
        at = first + place
        inside = at < blocks
        all_inside = own[:, None] & inside[None, :]
        words = (start + at[None, :])[:, :, None] * 4 + word_of[None, None, :]
        word = tl.load(codes + words, all_inside[:, :, None], other=0)
        scale = tl.load(scales + (start + at[None, :]) // SHARED, all_inside, other=0.0).to(tl.float32)
        part = tl.zeros((ROWS, BLOCKS, 4), tl.float32)
        sums = tl.zeros((BLOCKS, 4), tl.float32)
        for half in tl.static_range(2):
            four = tl.load(x + at[:, None] * 8 + half * 4 + word_of[None, :], inside[:, None], other=0)
            for pair in tl.static_range(2):
                both = (four >> 32 * pair).to(tl.int32)
                even = (both << 16).to(tl.float32, bitcast=True)
                odd = (both & -65536).to(tl.float32, bitcast=True)
                if TABLE:  # rounded as where weights are laid out
                    one = tl.load(table + ((word >> (16 * pair + 4 * half)) & 15))
                    one = (one * scale[:, :, None]).to(tl.bfloat16).to(tl.float32)
                    other = tl.load(table + ((word >> (16 * pair + 8 + 4 * half)) & 15))
                    other = (other * scale[:, :, None]).to(tl.bfloat16).to(tl.float32)
                else:
                    sums += even + odd
                    one = word >> 4 * half if pair else word << 16 - 4 * half
                    other = word >> 8 + 4 * half if pair else word << 8 - 4 * half
                    one = ((one & 0xF0000) | exponent).to(tl.float32, bitcast=True)
                    other = ((other & 0xF0000) | exponent).to(tl.float32, bitcast=True)
                part += one * even[None, :, :]
                part += other * odd[None, :, :]
        if TABLE:
            total += tl.sum(part, 2)
        else:
            total += scale * (tl.sum(part, 2) - 136 * tl.sum(sums, 1)[None, :])
    tl.store(output + row, tl.sum(total, 1).to(output.dtype.element_ty), own)


def _few_rows_int8(  # pragma: no cover -- compiled
    x: tl.tensor,  # (rows, inputs)
    codes: tl.tensor,  # (outputs, inputs) int8
    scales: tl.tensor,  # (outputs,)
    output: tl.tensor,  # (rows, outputs)
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    exponent: tl.tensor,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    EVEN: tl.constexpr,  # whether tiles fill outputs and inputs
    STAGES: tl.constexpr,
) -> None:
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    place = tl.arange(0, INPUTS)
    own, given = out < outputs, row < rows
    start = out.to(tl.int64)[:, None] * inputs
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        at = first + place
        where = x + row[:, None] * inputs + at[None, :]
        if EVEN:
            code = tl.load(codes + start + at[None, :])
            some = tl.load(where, given[:, None], other=0.0)
        else:
            inside = at < inputs
            code = tl.load(codes + start + at[None, :], own[:, None] & inside[None, :], other=0)
            some = tl.load(where, given[:, None] & inside[None, :], other=0.0)
        word = code.to(tl.int32) ^ 128
        number = (((word << 15) & 0x7F8000) | exponent).to(tl.float32, bitcast=True) * 2 - 384
        total = tl.dot(number.to(x.dtype.element_ty), tl.trans(some), total)
    total *= tl.load(scales + out, own, other=0.0).to(tl.float32)[:, None]
    tl.store(
        output + row[None, :] * outputs + out[:, None],
        total.to(output.dtype.element_ty),
        own[:, None] & given[None, :],
    )


def _few_rows_4bit(  # pragma: no cover -- compiled
    x: tl.tensor,  # (rows, inputs)
    codes: tl.tensor,  # (outputs, inputs / 2) uint8
    scales: tl.tensor,  # (outputs, inputs / 32 / SHARED)
    table: tl.tensor,  # (16,) float32
    output: tl.tensor,  # (rows, outputs)
    rows: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    exponent: tl.tensor,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,  # of a tile
    SHARED: tl.constexpr,  # blocks of 32 to a scale
    TABLE: tl.constexpr,
    EVEN: tl.constexpr,  # whether tiles fill outputs and inputs
    STAGES: tl.constexpr,
) -> None:
    out = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    byte = tl.arange(0, INPUTS // 2)
    block = tl.arange(0, INPUTS // 32)
    own, given = out < outputs, row < rows
    start = out.to(tl.int64)[:, None]
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        at, place = first // 2 + byte, first // 32 + block
        # Of 32 numbers the first 16 are the lower halves of 16 bytes.
        where = x + row[:, None] * inputs + ((at // 16) * 32 + at % 16)[None, :]
        bytes_at = codes + start * (inputs // 2) + at[None, :]
        scales_at = scales + (start * (inputs // 32) + place[None, :]) // SHARED
        if EVEN:
            code = tl.load(bytes_at)
            scale = tl.load(scales_at)
            some = tl.load(where, given[:, None], other=0.0)
            others = tl.load(where + 16, given[:, None], other=0.0)
        else:
            inside, within = at * 2 < inputs, place * 32 < inputs
            code = tl.load(bytes_at, own[:, None] & inside[None, :], other=0)
            scale = tl.load(scales_at, own[:, None] & within[None, :], other=0.0)
            some = tl.load(where, given[:, None] & inside[None, :], other=0.0)
            others = tl.load(where + 16, given[:, None] & inside[None, :], other=0.0)
        spread = tl.broadcast_to(scale.to(tl.float32)[:, :, None], (OUTPUTS, INPUTS // 32, 16))
        spread = tl.reshape(spread, (OUTPUTS, INPUTS // 2))
        if TABLE:
            low = tl.load(table + (code & 15)) * spread
            high = tl.load(table + (code >> 4)) * spread
        else:
            word = code.to(tl.int32)
            low = (((word << 16) & 0xF0000) | exponent).to(tl.float32, bitcast=True)
            high = (((word << 12) & 0xF0000) | exponent).to(tl.float32, bitcast=True)
            low, high = (low - 136) * spread, (high - 136) * spread
        total = tl.dot(low.to(x.dtype.element_ty), tl.trans(some), total)
        total = tl.dot(high.to(x.dtype.element_ty), tl.trans(others), total)
    tl.store(
        output + row[None, :] * outputs + out[:, None],
        total.to(output.dtype.element_ty),
        own[:, None] & given[None, :],
    )


def _lay_out_4bit(  # pragma: no cover -- compiled
    codes: tl.tensor,  # (outputs * inputs / 2,) uint8
    scales: tl.tensor,  # (outputs * inputs / 32 / SHARED,)
    table: tl.tensor,  # (16,) float32
    output: tl.tensor,  # (outputs * inputs,)
    count: tl.tensor,  # of bytes
    BYTES: tl.constexpr,
    SHARED: tl.constexpr,  # blocks of 32 to a scale
) -> None:
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < count
    code = tl.load(codes + at, inside, other=0)
    scale = tl.load(scales + at // (16 * SHARED), inside, other=0.0).to(tl.float32)
    low = (tl.load(table + (code & 15)) * scale).to(tl.bfloat16).to(output.dtype.element_ty)
    high = (tl.load(table + (code >> 4)) * scale).to(tl.bfloat16).to(output.dtype.element_ty)
    where = output + at // 16 * 32 + at % 16
    tl.store(where, low, inside)
    tl.store(where + 16, high, inside)


one_row_int8: Any = triton.jit(_one_row_int8)
one_row_4bit: Any = triton.jit(_one_row_4bit)
few_rows_int8: Any = triton.jit(_few_rows_int8)
few_rows_4bit: Any = triton.jit(_few_rows_4bit)
lay_out_4bit: Any = triton.jit(_lay_out_4bit)
