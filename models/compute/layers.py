"""Linear layer and norms, from which blocks, embedding and LM head are built.

The product has its weight laid out once, at load, for the processor it will run on. On a CPU that is
oneDNN's blocked layout. Measured on one core of an AMD EPYC (Zen 5, torch 2.13), a 5632 x 1024 weight,
microseconds for 1 / 8 / 512 rows:

    float32    F.linear 1534 / 2517 / 58357    packed 583 / 868 / 25556
    bfloat16   F.linear  751 /  855 / 13375    packed 308 / 472 / 12447

F.linear hands float32 to MKL, which does not like this processor, and bfloat16 to oneDNN with the weight as
it lies, to be repacked on every call. The packed product reads its weight at 35 GB/s, which is all that the
core gets from its memory. It takes any number of rows; only a layout made for exactly one is slower. It
replaces the plain one, so nothing is held twice.

For every number of rows that it has not seen, oneDNN compiles a kernel and keeps it: 0.6 MB and some
milliseconds for each weight, and a bound on its cache does not give the memory back. A node that is sent
prompts of all lengths grew by 730 MiB (three blocks of the bundled model, 1 to 320 rows, torch 2.13). So
beyond a few rows, zeros fill them up to the next of four sizes per power of two: 36 kernels up to 1024 rows.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.models.quantised.products import QuantisedLinear

# What torch freezes a compiled CPU model's layers to. Not public, so its absence is a case: see can_pack.
_MKLDNN: Any = torch.ops.mkldnn
_linear_pointwise: Any = getattr(_MKLDNN, "_linear_pointwise", None)
_FEW_ROWS = 128  # for which a weight is not worth being packed anew
_EXACT_ROWS = 8  # up to which every number of rows, a batch of decode steps, has a kernel of its own


class Linear:
    """`rows @ weight.T + bias`, for rows of shape (tokens, in_features)."""

    __slots__ = ("_bias", "_keeps_transposed", "_packed", "_transposed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = can_pack(weight.device, weight.dtype)
        self._weight: Tensor = _MKLDNN._reorder_linear_weight(weight) if self._packed else weight
        self._keeps_transposed = False
        self._transposed: Linear | None = None

    def dense(self) -> Tensor:
        """The weight, (out_features, in_features), as it was given; a copy where it is packed."""
        return self._weight.to_dense() if self._packed else self._weight

    @property
    def transposed_bytes(self) -> int:
        """Bytes that `keep_transposed` takes; 0 where products with the transposed weight need no copy."""
        return self._weight.nbytes if self._packed else 0

    def keep_transposed(self, keep: bool) -> None:
        """Keep the transposed weight from the first `times_weight` on, or keep it no longer."""
        self._keeps_transposed = keep
        if not keep:
            self._transposed = None

    def times_weight(self, rows: Tensor) -> Tensor:
        """`rows @ weight`, (tokens, out_features) -> (tokens, in_features): the gradient of what went in."""
        if not self._packed:
            return rows @ self._weight
        kept = self._transposed
        if kept is None:
            dense = self.dense()
            if not self._keeps_transposed and len(rows) <= _FEW_ROWS:
                return rows @ dense
            kept = Linear(dense.t().contiguous())
            if self._keeps_transposed:
                self._transposed = kept
        return kept(rows.contiguous())

    def __call__(self, rows: Tensor) -> Tensor:
        if not self._packed:
            return functional.linear(rows, self._weight, self._bias)
        count = len(rows)
        if count <= _EXACT_ROWS:
            product: Tensor = _linear_pointwise(rows, self._weight, self._bias, "none", [], "")
            return product
        padded = functional.pad(rows, (0, 0, 0, padded_rows(count) - count))
        product = _linear_pointwise(padded, self._weight, self._bias, "none", [], "")
        return product[:count]


class ScaledLinear:
    """A layer each of whose outputs is multiplied by a number of its own, before the bias."""

    __slots__ = ("_bias", "_linear", "_scales")

    def __init__(self, linear: Linear, scales: Tensor, bias: Tensor | None = None) -> None:
        self._linear = linear
        self._scales = scales
        self._bias = bias

    def dense(self) -> Tensor:
        """The weight, (out_features, in_features)."""
        return self._linear.dense() * self._scales[:, None]

    @property
    def transposed_bytes(self) -> int:
        """See `Linear`."""
        return self._linear.transposed_bytes

    def keep_transposed(self, keep: bool) -> None:
        """See `Linear`."""
        self._linear.keep_transposed(keep)

    def times_weight(self, rows: Tensor) -> Tensor:
        """See `Linear`."""
        return self._linear.times_weight(rows * self._scales)

    def __call__(self, rows: Tensor) -> Tensor:
        output = self._linear(rows) * self._scales
        return output if self._bias is None else output + self._bias


AnyLinear: TypeAlias = Linear | ScaledLinear | QuantisedLinear


class RmsNorm:
    """Root mean square norm.

    With `stepwise` the normed rows are rounded before they are weighted, as in transformers.
    """

    __slots__ = ("_eps", "_shape", "_stepwise", "_weight")

    def __init__(self, weight: Tensor, eps: float, *, stepwise: bool = False) -> None:
        self._shape = weight.shape
        self._weight = weight
        self._eps = eps
        self._stepwise = stepwise

    def stepwise(self) -> RmsNorm:
        """The same norm, rounding stepwise."""
        return RmsNorm(self._weight, self._eps, stepwise=True)

    def __call__(self, rows: Tensor) -> Tensor:
        if self._stepwise and rows.dtype == self._weight.dtype:
            return (
                functional.rms_norm(rows.float(), self._shape, None, self._eps).to(rows.dtype) * self._weight
            )
        if rows.dtype == self._weight.dtype:
            return functional.rms_norm(rows, self._shape, self._weight, self._eps)
        return functional.rms_norm(rows.float(), self._shape, self._weight, self._eps).to(rows.dtype)


class LayerNorm:
    """Norm of mean 0 and variance 1, with or without a bias; a weight may be (heads, head_dim)."""

    __slots__ = ("_bias", "_eps", "_weight")

    def __init__(self, weight: Tensor, eps: float, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._eps = eps
        self._bias = bias

    def stepwise(self) -> LayerNorm:
        """The same norm: transformers rounds it once, too."""
        return self

    def __call__(self, rows: Tensor) -> Tensor:
        size = rows.shape[-1:]
        if self._weight.dim() == 1 and rows.dtype == self._weight.dtype:
            return functional.layer_norm(rows, size, self._weight, self._bias, self._eps)
        normed = functional.layer_norm(rows.float(), size, None, None, self._eps) * self._weight.float()
        return (normed if self._bias is None else normed + self._bias.float()).to(rows.dtype)


Norm: TypeAlias = RmsNorm | LayerNorm


class HeadNorm:
    """Norm of queries or keys, (tokens, heads, head_dim), head by head or over all heads together."""

    __slots__ = ("_joined", "_norm")

    def __init__(self, norm: Norm, *, joined: bool) -> None:
        self._norm = norm
        self._joined = joined

    def stepwise(self) -> HeadNorm:
        """The same norm, rounding stepwise."""
        return HeadNorm(self._norm.stepwise(), joined=self._joined)

    def __call__(self, heads: Tensor) -> Tensor:
        if self._joined:
            return self._norm(heads.flatten(1)).view(heads.shape)
        return self._norm(heads)


def is_norm(part: object) -> bool:
    """True for any of these."""
    return isinstance(part, RmsNorm | LayerNorm | HeadNorm)


def padded_rows(count: int) -> int:
    """The number of rows that a packed product is given for `count` of them."""
    if count <= _EXACT_ROWS:
        return count
    step = 1 << ((count - 1).bit_length() - 3)
    return -(-count // step) * step


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True if oneDNN has kernels for this dtype on this machine."""
    if device.type != "cpu" or not hasattr(_MKLDNN, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(_MKLDNN._is_mkldnn_bf16_supported())
    return dtype == torch.float32
