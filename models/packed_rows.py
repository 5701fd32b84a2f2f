"""Packed rows: hidden states as 8-bit integers, of which 32 neighbours share a power of two.

The format is MXINT8 of the OCP Microscaling Formats (MX) Specification 1.0: a block of 32 values has a
biased exponent of eight bits, E8M0, and each of its values is an integer times 2**(exponent - 127 - 6). The
exponent is that of the block's largest value, so that one has seven significant bits.

    row:  | exponents, one byte a block | integers, one byte a value |

Since scales are powers of two, an integer times its scale is a float32, bfloat16 or float16 without another
rounding, and packing what was unpacked gives the same bytes. So a log may hold what was unpacked and send it
packed, and whoever signs for unpacked values signs for what was sent.

Blocks of no value above 2**-18 are rounded as if they had one: their integers are multiples of 2**-24, the
least number of a float16.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .numerics import PACKED_BLOCK, packed_row_bytes

_MOST: Final = 127  # of the integers; -128 would be a value without its opposite
_POINT: Final = 6  # binary places behind an integer's first bit
_MANTISSA_BITS: Final = 23  # of a float32
_EXPONENT_BITS: Final = 0xFF
_BIAS: Final = 127
_LEAST_EXPONENT: Final = _BIAS - 18


def pack_rows(rows: Tensor) -> Tensor:
    """(tokens, packed_row_bytes) uint8 for (tokens, hidden_size) of any float dtype on the CPU.

    What is not finite becomes a value beyond 2**127, which no receiver takes in.
    """
    tokens, hidden_size = rows.shape
    blocks = _blocks(rows.float())
    exponents = _exponents(blocks)
    integers = (blocks * _power(_BIAS + _POINT + _BIAS - exponents)[..., None]).round_()
    integers = integers.nan_to_num_(nan=_MOST).clamp_(-_MOST, _MOST).to(torch.int8).view(tokens, -1)
    packed = torch.empty(tokens, packed_row_bytes(hidden_size), dtype=torch.uint8)
    packed[:, : exponents.shape[1]] = exponents
    packed[:, exponents.shape[1] :] = integers[:, :hidden_size].view(torch.uint8)
    return packed


def unpack_rows(packed: Tensor, hidden_size: int) -> Tensor:
    """(tokens, hidden_size) float32 for (tokens, packed_row_bytes) uint8; any bytes give some values."""
    count = packed.shape[1] - hidden_size
    exponents = packed[:, :count].int()
    blocks = _blocks(packed[:, count:].contiguous().view(torch.int8).float())
    return (
        (blocks * _power(exponents - _POINT)[..., None]).view(len(packed), -1)[:, :hidden_size].contiguous()
    )


def rounded_rows(rows: Tensor) -> Tensor:
    """(tokens, hidden_size) float32: `rows` as they are once they were packed and unpacked."""
    return unpack_rows(pack_rows(rows), rows.shape[1])


def steps_of(rows: Tensor) -> Tensor:
    """(tokens, hidden_size) float32: distance of adjacent packed values, where `rows` are packed."""
    steps = _power(_exponents(_blocks(rows.float())) - _POINT)
    return steps.repeat_interleave(PACKED_BLOCK, 1)[:, : rows.shape[1]]


def nearest_unpacked(exact: Tensor, got: Tensor) -> Tensor:
    """Of all rows that would be packed as `got`, those nearest to `exact`; all (tokens, hidden_size) float32.

    The steps are those of `got`, whatever exponents its sender chose.
    """
    steps = steps_of(got)
    # The largest integer also stands for what lies between it and the next power of two.
    outwards = torch.where(got.abs() >= _MOST * steps, steps, steps / 2)
    above, below = (torch.where(side, outwards, steps / 2) for side in (got > 0, got < 0))
    return torch.minimum(torch.maximum(exact, got - below), got + above)


def _blocks(rows: Tensor) -> Tensor:
    """(tokens, blocks, PACKED_BLOCK), the last block filled up with zeros."""
    lacking = -rows.shape[1] % PACKED_BLOCK
    if lacking:
        rows = torch.nn.functional.pad(rows, (0, lacking))
    return rows.view(len(rows), rows.shape[1] // PACKED_BLOCK, PACKED_BLOCK)


def _exponents(blocks: Tensor) -> Tensor:
    """(tokens, blocks) int32, biased."""
    largest = blocks.abs().amax(-1)
    return ((largest.view(torch.int32) >> _MANTISSA_BITS) & _EXPONENT_BITS).clamp_min(_LEAST_EXPONENT)


def _power(exponents: Tensor) -> Tensor:
    """2**(exponent - 127) in float32, by its bits; of exponents below 1 the least normal number."""
    return (exponents.clamp(1, _EXPONENT_BITS - 1) << _MANTISSA_BITS).view(torch.float32)
