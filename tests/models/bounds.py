"""What rounding alone can do to a result, by arithmetic, in whatever order a processor adds up.

See Higham, Accuracy and Stability of Numerical Algorithms (2nd ed.), section 3.1: a sum of n products in a
precision of unit roundoff u is off by less than n * u times the sum of their magnitudes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNIT = torch.finfo(torch.float32).eps / 2  # kernels add up in float32, whatever they are given


def bound_of_product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """How far `rows @ weight.T + bias` may lie from what it is exactly, (tokens, out_features) float64.

    The result is rounded to the rows' dtype once, or twice if the bias is added by itself.
    """
    magnitude = rows.double().abs() @ weight.double().abs().T
    if bias is not None:
        magnitude += bias.double().abs()
    return magnitude * (torch.finfo(rows.dtype).eps + (weight.shape[1] + 1) * _UNIT)


def bound_of_attention(values: Tensor) -> float:
    """How far a mean of `values`, (length, heads, head_dim), weighted by softmax may lie from the exact one.

    Scores, weights and the mean are rounded to the values' dtype at most, and a score's rounding counts
    twice: in the weight and in their sum.
    """
    return float(values.abs().max()) * (4 * torch.finfo(values.dtype).eps + 2 * len(values) * _UNIT)
