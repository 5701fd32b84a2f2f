"""Products of torch's own kernels on a CPU, which read the weights as they are held.

Both take rows in bfloat16 and add up in float32; other rows are rounded first, and what comes out is given
back in their dtype. In float32 these kernels are ten times slower than in bfloat16 (AMD EPYC, torch 2.13).
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from .formats import Packed, held, in_bytes, in_order, laid_out_product, parts_of

_ATEN: Any = torch.ops.aten
# Rows from which laying the weight out in full, and the processor's own product, cost less.
_INT8_ROWS: Final = 24
_INT4_ROWS: Final = 48
_BLOCK: Final = 64  # rows that `_convert_weight_to_int4pack_for_cpu` interleaves, at most


class Int8OnCpu:
    """Rows times an int8 weight."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self._packed.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        return self._packed.dense(dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        if len(rows) >= _INT8_ROWS:
            return laid_out_product(rows, self._packed)
        packed = self._packed
        output: Tensor = _ATEN._weight_int8pack_mm(rows.bfloat16(), packed.codes, packed.scales)
        return output.to(rows.dtype)


class Int4OnCpu:
    """Rows times an int4 weight, laid out as torch's kernel wants it."""

    def __init__(self, packed: Packed) -> None:
        self._format = packed.format
        self._inputs = packed.inputs
        self._codes = held((len(packed.codes), packed.codes.shape[1]), torch.uint8, packed.codes.device)
        for part in parts_of(len(packed.codes) // _BLOCK, _BLOCK * packed.inputs):
            rows = slice(part.start * _BLOCK, part.stop * _BLOCK)
            numbers = in_order(packed.codes[rows]).int()
            self._codes[rows] = _ATEN._convert_weight_to_int4pack_for_cpu(numbers, 1)
        scales = packed.scales.t()
        both = held((len(scales), 2 * scales.shape[1]), scales.dtype, scales.device)
        self._scales = both.view(*scales.shape, 2)
        self._scales[..., 0] = scales

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self._codes.nbytes + self._scales.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        codes = in_bytes(_unpacked(self._codes, _interleaving()))
        scales = self._scales[..., 0].t().contiguous()
        return Packed(self._format, self._inputs, codes, scales).dense(dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        if len(rows) >= _INT4_ROWS:
            return functional.linear(rows, self.dense(rows.dtype))
        output: Tensor = _ATEN._weight_int4pack_mm_for_cpu(
            rows.bfloat16(), self._codes, self._format.group, self._scales
        )
        return output.to(rows.dtype)


def can_multiply_int8(packed: Packed) -> bool:
    """True if torch's kernel takes such a weight."""
    return packed.inputs % 16 == 0 and len(packed.codes) % 16 == 0


def can_multiply_int4(packed: Packed) -> bool:
    """True if torch's kernel takes such a weight, and its layout is one that is known here."""
    whole = packed.inputs % packed.format.group == 0 and len(packed.codes) % _BLOCK == 0
    return whole and hasattr(_ATEN, "_weight_int4pack_mm_for_cpu") and _interleaving() != (0, 0)


@cache
def _interleaving() -> tuple[int, int]:
    """Interleaving of rows in this processor's layout, see `_unpacked`; (0, 0) if it is not known."""
    numbers = torch.randint(0, 16, (_BLOCK, 32), generator=torch.Generator().manual_seed(0))
    packed = _ATEN._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
    for halves in ((2, 16), (1, 16), (16, 1), (1, 32), (2, 8), (32, 1)):
        if torch.equal(_unpacked(packed, halves), numbers.to(torch.uint8)):
            return halves
    return 0, 0


def _unpacked(packed: Tensor, halves: tuple[int, int]) -> Tensor:
    """(rows, inputs) uint8 of (rows, inputs / 2) interleaved bytes.

    For each input, `count` runs of `size` bytes: their lower halves are `size` rows, their upper ones the
    next `size`.
    """
    count, size = halves
    block = 2 * count * size
    rows, inputs = len(packed), packed.shape[1] * 2
    runs = packed.view(rows // block, inputs, count, size)
    return torch.stack((runs & 15, runs >> 4), 3).permute(0, 2, 3, 4, 1).reshape(rows, inputs)
