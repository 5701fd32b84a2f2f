"""Products on a GPU by the kernels of `triton_kernels`, each with the tile sizes that are fastest there.

The sizes are found when the first weight of a shape is loaded: every candidate is compiled, once for all
shapes, and timed on that weight. Compiled kernels are kept on disk by Triton.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import triton_kernels as kernels
from .formats import INT4, INT8, Packed, laid_out_product

logger = logging.getLogger(__name__)

FEW_ROWS: Final = 64  # above which a weight is laid out in full, and the card's own product is faster
_LAID_OUT_AT_ONCE: Final = 1024  # bytes
_WARM_UP_MS, _TIMED_MS = 2, 8  # of each candidate
_FOUR: Final = 4  # numbers of a row that are loaded at once
_BLOCK: Final = 32  # numbers whose 4-bit codes lie together
_EXPONENT: Final = 0x43000000  # see `triton_kernels`


class Tile(NamedTuple):
    """Part of a product that one program of a kernel computes."""

    outputs: int
    width: int  # words of a row for int8, else groups; inputs for several rows
    warps: int
    stages: int = 1


ONE_ROW_INT8: Final = (
    *(Tile(4, 256, 4), Tile(8, 128, 4), Tile(8, 256, 4), Tile(8, 256, 8)),
    *(Tile(16, 128, 4), Tile(16, 128, 8), Tile(16, 256, 8), Tile(4, 512, 4), Tile(2, 512, 4)),
)
ONE_ROW_4BIT: Final = (
    *(Tile(4, 32, 2), Tile(4, 64, 4), Tile(8, 32, 4), Tile(8, 64, 4), Tile(16, 32, 4)),
    *(Tile(16, 32, 8), Tile(8, 64, 8), Tile(4, 128, 4), Tile(2, 128, 4)),
)
FEW_ROWS_TILES: Final = (
    *(Tile(64, 64, 4, 4), Tile(64, 128, 4, 3), Tile(64, 128, 4, 4), Tile(32, 128, 4, 4)),
    *(Tile(64, 256, 4, 3), Tile(128, 64, 4, 4), Tile(128, 128, 8, 3)),
)


class OnGpu:
    """Rows times a quantised weight.

    Args:
        packed: The weight, on the card.
        tiles: Tile for each number of rows in `row_counts`.
    """

    def __init__(self, packed: Packed, tiles: dict[int, Tile]) -> None:
        self._packed = packed
        self._tiles = tiles
        self._words = packed.codes.view(torch.int32)
        self._table = table_of(packed)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self._packed.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        packed = self._packed
        if packed.format is INT8 or packed.inputs % packed.format.group:
            return packed.dense(dtype)
        whole = torch.empty(len(packed.codes), packed.inputs, dtype=dtype, device=packed.codes.device)
        count = packed.codes.numel()
        with on_device_of(whole):
            kernels.lay_out_4bit[(-(-count // _LAID_OUT_AT_ONCE),)](
                *(packed.codes, packed.scales, self._table, whole, count),
                BYTES=_LAID_OUT_AT_ONCE,
                SHARED=packed.format.group // _BLOCK,
            )
        return whole

    def __call__(self, rows: Tensor) -> Tensor:
        if len(rows) > FEW_ROWS:
            if self._packed.format is INT8:
                return laid_out_product(rows, self._packed)
            return functional.linear(rows, self.dense(rows.dtype))
        rows = rows.contiguous()
        if rows.storage_offset() % _FOUR:  # of a larger tensor, where eight bytes are not aligned
            rows = rows.clone()
        return self.launch(rows, self._tiles[row_class(len(rows))])

    def launch(self, rows: Tensor, tile: Tile) -> Tensor:
        """The product by programs of this tile."""
        count, outputs = len(rows), len(self._packed.codes)
        output = torch.empty(count, outputs, dtype=rows.dtype, device=rows.device)
        grid = (-(-outputs // tile.outputs),)
        with on_device_of(rows):
            if count == 1:
                self._launch_one(grid, rows.view(torch.int64), output, tile)
            else:
                self._launch_few(grid, rows, output, tile)
        return output

    def _launch_one(self, grid: tuple[int], fours: Tensor, output: Tensor, tile: Tile) -> None:
        packed = self._packed
        outputs, inputs = len(packed.codes), packed.inputs
        if packed.format is INT8:
            kernels.one_row_int8[grid](
                *(fours, self._words, packed.scales, output, outputs, inputs // 4, _EXPONENT),
                ROWS=tile.outputs,
                WORDS=tile.width,
                num_warps=tile.warps,
            )
            return
        kernels.one_row_4bit[grid](
            *(fours, self._words, packed.scales, self._table, output, outputs, inputs // _BLOCK, _EXPONENT),
            ROWS=tile.outputs,
            BLOCKS=tile.width,
            SHARED=packed.format.group // _BLOCK,
            TABLE=packed.format is not INT4,
            num_warps=tile.warps,
        )

    def _launch_few(self, grid: tuple[int], rows: Tensor, output: Tensor, tile: Tile) -> None:
        packed, count = self._packed, len(rows)
        outputs, inputs = len(packed.codes), packed.inputs
        common = {
            "ROWS": row_class(count),
            "OUTPUTS": tile.outputs,
            "INPUTS": tile.width,
            "EVEN": not (outputs % tile.outputs or inputs % tile.width),
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }
        if packed.format is INT8:
            kernels.few_rows_int8[grid](
                *(rows, packed.codes, packed.scales, output, count, outputs, inputs, _EXPONENT), **common
            )
            return
        kernels.few_rows_4bit[grid](
            *(rows, packed.codes, packed.scales, self._table, output, count, outputs, inputs, _EXPONENT),
            SHARED=packed.format.group // _BLOCK,
            TABLE=packed.format is not INT4,
            **common,
        )


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on a tensor's card, and not on the one that is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def table_of(packed: Packed) -> Tensor:
    """Numbers that its codes stand for, on its device; a single 0 where codes are numbers."""
    return torch.tensor(packed.format.values or (0.0,), device=packed.codes.device)


def row_class(count: int) -> int:
    """Rows that a kernel is made for, where there are so many."""
    return 1 if count == 1 else max(16, 1 << (count - 1).bit_length())


ROW_CLASSES: Final = (1, 16, 32, 64)


def can_multiply(packed: Packed, dtype: torch.dtype) -> bool:
    """True if the kernels take such a weight, and rows of that dtype."""
    return dtype == torch.bfloat16 and packed.inputs % (packed.format.group or 16) == 0


def candidates(packed: Packed, rows: int) -> Sequence[Tile]:
    """Tiles to choose among for so many rows."""
    if rows > 1:
        return FEW_ROWS_TILES
    return ONE_ROW_INT8 if packed.format is INT8 else ONE_ROW_4BIT


def fastest(packed: Packed) -> dict[int, Tile]:
    """The fastest tile for each number of rows in `ROW_CLASSES`, timed on this weight."""
    found: dict[int, Tile] = {}
    product = OnGpu(packed, {})
    for rows in ROW_CLASSES:
        given = torch.ones(rows, packed.inputs, dtype=torch.bfloat16, device=packed.codes.device)
        tiles = candidates(packed, rows) if rows <= 16 else (found[16],)
        times = {tile: milliseconds(product, given, tile) for tile in tiles}
        found[rows] = min(times, key=lambda tile: times[tile])
        if times[found[rows]] == math.inf:
            raise RuntimeError(
                f"no kernel for {rows} rows runs on {torch.cuda.get_device_name(given.device)}"
            )
    return found


def milliseconds(product: OnGpu, rows: Tensor, tile: Tile) -> float:
    """Time of a product with caches that hold none of the weight; infinite if this tile does not work here.

    A card may lack room for it, and a compiler may fail at it.
    """
    try:
        timed: float = kernels.triton.testing.do_bench(
            lambda: product.launch(rows, tile), warmup=_WARM_UP_MS, rep=_TIMED_MS, return_mode="median"
        )
    except Exception as exc:  # of the card, of Triton, of its compiler
        logger.debug("quantised.tile fails tile=%s rows=%d why=%s", tile, len(rows), exc)
        return math.inf
    return timed
