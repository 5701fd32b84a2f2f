"""A linear layer whose weight is held quantised, and the choice of what multiplies with it.

Of each kind of product, the first is tested when it is loaded: it has to give what the weight laid out in
full gives, within what rounding to bfloat16 explains. One that does not, or cannot be compiled, is not used.
What is left then lays each weight out anew for each product: slow, and right on every device.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .cpu_products import Int4OnCpu, Int8OnCpu, can_multiply_int4, can_multiply_int8
from .formats import INT4, INT8, Packed, laid_out_product

logger = logging.getLogger(__name__)

# Relative error of products of random numbers: bfloat16 explains 0.002 to 0.004, a wrong scale far more.
_TOLERANCE: Final = 0.02
_TESTED_OUTPUTS: Final = 512  # of a weight; all of a large one would not fit beside it
_TESTED_ROWS: Final = (1, 2, 7, 33, 80)

# What was found for a kind of product: a GPU's tiles by rows, None if plain products are to be used.
found_products: dict[tuple[Any, ...], Any] = {}


class Product(Protocol):
    """Product of rows with one quantised weight."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its weight takes."""
        ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight, (outputs, inputs)."""
        ...

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows, (n, inputs), times the weight: (n, outputs) in their dtype."""
        ...


class PlainProduct:
    """A product that lays its weight out each time."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its weight takes."""
        return self._packed.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        return self._packed.dense(dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        return laid_out_product(rows, self._packed)


class QuantisedLinear:
    """`rows @ weight.T + bias`, for rows of shape (tokens, in_features) in `dtype`."""

    __slots__ = ("_bias", "_dtype", "_product")

    def __init__(self, packed: Packed, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        self._product = choose_product(packed, dtype)
        self._dtype = dtype
        self._bias = bias

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self._product.nbytes

    def dense(self) -> Tensor:
        """The weight, (out_features, in_features), laid out."""
        return self._product.dense(self._dtype)

    @property
    def transposed_bytes(self) -> int:
        """0: no transposed weight is kept; it would take what quantising saved."""
        return 0

    def keep_transposed(self, keep: bool) -> None:
        """Nothing."""

    def times_weight(self, rows: Tensor) -> Tensor:
        """`rows @ weight`, the gradient of what went in."""
        return rows @ self.dense()

    def __call__(self, rows: Tensor) -> Tensor:
        output = self._product(rows)
        return output if self._bias is None else output + self._bias


def choose_product(packed: Packed, dtype: torch.dtype) -> Product:
    """The fastest product with that weight that is right here, for rows of `dtype`."""
    outputs, device = len(packed.codes), packed.codes.device
    kind = (packed.format.name, outputs, packed.inputs, dtype, device)
    try:
        if device.type == "cpu":
            return _on_cpu(packed, dtype, kind)
        if device.type == "cuda" and find_spec("triton") is not None:
            return _on_gpu(packed, dtype, kind)
    # Whatever a compiler that is not there, or a card that it does not know, may raise.
    except Exception as exc:
        logger.warning(
            "products of %s weights are computed slowly on %s: %s", packed.format.name, device, _line(exc)
        )
        found_products[kind] = None
    return PlainProduct(packed)


def _on_cpu(packed: Packed, dtype: torch.dtype, kind: tuple[Any, ...]) -> Product:
    fast: type[Int8OnCpu | Int4OnCpu] | None = None
    if packed.format is INT8 and can_multiply_int8(packed):
        fast = Int8OnCpu
    elif packed.format is INT4 and can_multiply_int4(packed):
        fast = Int4OnCpu
    if fast is not None and kind not in found_products:
        part = _tested_part(packed)
        found_products[kind] = fast if _is_right(fast(part), part, dtype) else None
    return PlainProduct(packed) if fast is None or found_products[kind] is None else fast(packed)


def _on_gpu(packed: Packed, dtype: torch.dtype, kind: tuple[Any, ...]) -> Product:
    from . import gpu_products  # and Triton

    if not gpu_products.can_multiply(packed, dtype):
        return PlainProduct(packed)
    if kind not in found_products:
        tiles = gpu_products.fastest(packed)
        part = _tested_part(packed)
        found_products[kind] = tiles if _is_right(gpu_products.OnGpu(part, tiles), part, dtype) else None
    tiles = found_products[kind]
    return PlainProduct(packed) if tiles is None else gpu_products.OnGpu(packed, tiles)


def _tested_part(packed: Packed) -> Packed:
    return packed.rows(slice(0, min(len(packed.codes), _TESTED_OUTPUTS)))


def _is_right(product: Product, packed: Packed, dtype: torch.dtype) -> bool:
    """True if a product agrees with the weight laid out in float32; says so where it does not."""
    weight = packed.dense(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for count in _TESTED_ROWS:
        rows = torch.randn(count, packed.inputs, generator=generator).to(weight.device, dtype)
        right = functional.linear(rows.float(), weight)
        error = _size(product(rows).float() - right) / max(_size(right), 1e-30)
        if not error <= _TOLERANCE:
            logger.warning(
                "this computer's fast products of %s weights are wrong by %.0f %% with %d rows; "
                "slower ones are used instead",
                *(packed.format.name, 100 * error, count),
            )
            return False
    return True


def _size(tensor: Tensor) -> float:
    return tensor.square().sum().sqrt().item()


def _line(exc: BaseException) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
