"""Formats of quantised weights: how a matrix is cut into codes and scales, and put together again.

All are symmetric, and follow from a weight alone: no data is needed, and two peers with one checkpoint hold
the same bits, whatever device they quantise on. What a code stands for is exact where products are computed
in bfloat16, too. If each kernel rounded the weights in its own way, all tokens would be off alike, and audits
take that for another model (reputation/verdict.py).

- `int8`: a byte and, for each row, a scale: the largest number over 127.
  Products take the codes as they are, and their outputs are scaled.
- `int4`: 4 bits and, for each 32 numbers of a row, a scale of five bits. With a code's three that makes
  eight, so a bfloat16 holds each product. The scale is the number of largest magnitude over -8, so that this
  one is met whatever its sign, as in GGUF's Q4_0. Its first five bits are tried, and the two numbers of so
  many bits on either side; that stays with which the squares of the errors add up to least.
- `nf4`: 4 bits, codes of a normal distribution's quantiles, times the largest magnitude of 64 numbers,
  rounded to bfloat16 (Dettmers et al., QLoRA, arXiv 2305.14314, section 3). bitsandbytes has these codes.

Scales of the first two are bfloat16, which the kernels of torch demand. Rows are padded with zeros to whole
groups. A byte holds two codes of 32 numbers: that of number i in its lower half, of i + 16 in its upper one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

# Numbers that are worked on at once. A processor keeps so many in its caches; on a card a step is a launch.
_AT_ONCE: Final[Mapping[str, int]] = {"cpu": 1 << 18, "cuda": 1 << 22}
_LAID_OUT_AT_ONCE: Final[Mapping[str, int]] = {"cpu": 1 << 18, "cuda": 1 << 26}

_FIFTH_BIT: Final = 1 << 19  # of a float32's significand, the last of four that are stored

_MAGNITUDE: Final = (1 << 31) - 1  # all of a float32 but its sign

_NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True, slots=True)
class Format:
    """A format.

    Attributes:
        name: What numerics call it.
        group: Numbers of a row that have one scale; 0 for the whole row.
        values: What a 4-bit code stands for, times the scale; empty for codes of 8 bits, which are numbers.
        scale_dtype: Of its scales.
    """

    name: str
    group: int
    values: tuple[float, ...]
    scale_dtype: torch.dtype

    def padded(self, inputs: int) -> int:
        """Length of a row of `inputs` numbers as it is held."""
        return -(-inputs // self.group) * self.group if self.group else inputs


INT8: Final = Format("int8", 0, (), torch.bfloat16)
INT4: Final = Format("int4", 32, tuple(float(code - 8) for code in range(16)), torch.bfloat16)
NF4: Final = Format("nf4", 64, _NF4, torch.float32)
FORMATS: Final[Mapping[str, Format]] = {each.name: each for each in (INT8, INT4, NF4)}


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised matrix.

    Attributes:
        format: Its format.
        inputs: Numbers of a row.
        codes: (outputs, inputs) int8; of a 4-bit format (outputs, padded inputs / 2) uint8.
        scales: (outputs,), or (outputs, groups).
    """

    format: Format
    inputs: int
    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.codes.nbytes + self.scales.nbytes

    def rows(self, index: Tensor | slice) -> Packed:
        """Some of its rows, in this order."""
        return Packed(self.format, self.inputs, self.codes[index], self.scales[index])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (outputs, inputs); that of int8 is rounded, the others are exact in bfloat16."""
        whole = torch.empty(len(self.codes), self.inputs, dtype=dtype, device=self.codes.device)
        # A product of two bfloat16 numbers has 16 bits, so float32 holds it, and either way rounds once.
        work = dtype if dtype == self.format.scale_dtype else torch.float32
        for part in parts_of(len(whole), self.inputs, _LAID_OUT_AT_ONCE[whole.device.type]):
            codes, scales = self.codes[part], self.scales[part].to(work)
            if not self.format.group:
                whole[part] = codes.to(work).mul_(scales[:, None])
                continue
            halves = in_order(codes).view(len(codes), -1, self.format.group)
            if self.format is INT4:
                numbers = halves.to(work).sub_(8)
            else:
                numbers = torch.tensor(self.format.values, device=codes.device)[halves.int()]
            numbers = numbers.mul_(scales[..., None]).bfloat16()
            whole[part] = numbers.flatten(1)[:, : self.inputs]
        return whole

    def laid_out(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """A matrix that is exact in `dtype`, and what each of its outputs is to be multiplied by.

        In float16 products of int8 codes could exceed what it holds, so there the matrix is rounded, to more
        bits than a bfloat16 has.
        """
        if self.format.group or dtype == torch.float16:
            return self.dense(dtype), None
        return self.codes.to(dtype), self.scales.to(dtype)


def blank(outputs: int, inputs: int, to: Format, device: torch.device) -> Packed:
    """A matrix of zeros, to be quantised into or to measure with."""
    width = to.padded(inputs)
    if not to.group:
        codes = held((outputs, inputs), torch.int8, device)
        return Packed(to, inputs, codes, torch.zeros(outputs, dtype=to.scale_dtype, device=device))
    codes = held((outputs, width // 2), torch.uint8, device)
    return Packed(to, inputs, codes, held((outputs, width // to.group), to.scale_dtype, device))


def held(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that are there to stay; on a CPU outside of the heap.

    Between the working memory of one weight and of the next, they would keep the heap from being given back:
    while 8 blocks of 4096 x 14336 were loaded in int8, it grew to 1.28 times their size.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap(-1, size), dtype=torch.uint8).view(dtype).view(shape)


def quantise(weight: Tensor, to: Format) -> Packed:
    """The matrix `weight`, (outputs, inputs) of any float dtype, in that format and on its device."""
    outputs, inputs = weight.shape
    packed = blank(outputs, inputs, to, weight.device)
    quantise_into(packed, weight)
    return packed


def quantise_into(packed: Packed, weight: Tensor) -> None:
    """Fill `packed`, which may be some rows of another, with what `weight` becomes."""
    to, codes, scales = packed.format, packed.codes, packed.scales
    outputs, inputs = weight.shape
    width = to.padded(inputs)
    for part in parts_of(outputs, inputs, _AT_ONCE[weight.device.type]):
        numbers = weight[part].float()
        if not to.group:
            codes[part], scales[part] = _by_rows(numbers, to)
            continue
        groups = functional.pad(numbers, (0, width - inputs)).view(len(numbers), -1, to.group)
        own, scales[part] = _by_quantiles(groups) if to is NF4 else _by_groups(groups, to)
        codes[part] = in_bytes(own.flatten(1))


def in_bytes(codes: Tensor) -> Tensor:
    """(rows, inputs) 4-bit codes, uint8, as (rows, inputs / 2) bytes."""
    low, high = codes.view(len(codes), -1, 2, 16).unbind(2)
    return (low | high << 4).flatten(1)


def in_order(packed: Tensor) -> Tensor:
    """The reverse of `in_bytes`."""
    apart = packed.view(len(packed), -1, 16)
    return torch.stack((apart & 15, apart >> 4), 2).flatten(1)


def laid_out_product(rows: Tensor, packed: Packed) -> Tensor:
    """The product with a weight that is laid out for it."""
    weight, scales = packed.laid_out(rows.dtype)
    output = functional.linear(rows, weight)
    return output if scales is None else output.mul_(scales)


def _by_rows(rows: Tensor, to: Format) -> tuple[Tensor, Tensor]:
    scales = (rows.abs().amax(1) / 127).to(to.scale_dtype)
    codes = (rows / _divisor(scales)[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def _by_groups(groups: Tensor, to: Format) -> tuple[Tensor, Tensor]:
    # A group in each column: what is done with its scale then runs along rows, several times as fast.
    columns = groups.flatten(0, -2).T.contiguous()
    low, high = columns.amin(0), columns.amax(0)
    bits = (torch.where(-low >= high, low, high) / -8).view(torch.int32) & -_FIFTH_BIT
    scales, lost = bits.view(torch.float32), _lost(columns, bits.view(torch.float32))
    can_move = bits & _MAGNITUDE > 2 * _FIFTH_BIT  # else it would become zero, or less
    for step in (_FIFTH_BIT, -_FIFTH_BIT, 2 * _FIFTH_BIT, -2 * _FIFTH_BIT):
        others = torch.where(can_move, bits + step, bits).view(torch.float32)
        others_lost = _lost(columns, others)
        scales, lost = scales.where(others_lost >= lost, others), lost.minimum(others_lost)
    codes = _codes(columns, scales).add_(8).to(torch.uint8)
    return codes.T.reshape(groups.shape), scales.view(groups.shape[:-1]).to(to.scale_dtype)


def _codes(columns: Tensor, scales: Tensor) -> Tensor:
    return (columns / _divisor(scales)).round_().clamp_(-8, 7)


def _lost(columns: Tensor, scales: Tensor) -> Tensor:
    """Sum of the squared errors of each column, in an order that no device chooses."""
    squares = _codes(columns, scales).mul_(scales).sub_(columns).square_()
    while half := len(squares) // 2:
        squares = squares[:half].add_(squares[half:])
    return squares[0]


def _by_quantiles(groups: Tensor) -> tuple[Tensor, Tensor]:
    scales = groups.abs().amax(-1)
    values = torch.tensor(_NF4, device=groups.device)
    between = (values[1:] + values[:-1]) / 2
    return torch.bucketize(groups / _divisor(scales)[..., None], between).to(torch.uint8), scales


def _divisor(scales: Tensor) -> Tensor:
    """`scales` in float32, 1 where all numbers are 0."""
    return torch.where(scales == 0, 1.0, scales.float())


def parts_of(rows: int, width: int, at_once: int = _AT_ONCE["cpu"]) -> list[slice]:
    """All rows, in parts of a bounded number of elements."""
    step = max(1, at_once // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
