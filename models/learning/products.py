"""Products of frozen weights, differentiable in what goes in, with low-rank updates on top.

Weights that were packed for the processor (`compute/layers.py`) have no gradient of torch's. That of their
input is a product with the transposed weight, which is laid out anew for each backward pass and dropped,
unless there is memory to keep it (`SpanPasses.keep_transposed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.models.compute.layers import AnyLinear

from .adapter import Factors, LowRank


class _Frozen(torch.autograd.Function):
    """`linear(rows)` whose backward gives the rows' gradient and none of the weight."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, linear: AnyLinear) -> Tensor:
        ctx.linear = linear
        return linear(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return ctx.linear.times_weight(gradient), None


def product(linear: AnyLinear, rows: Tensor) -> Tensor:
    """`linear(rows)`, differentiable in the rows."""
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return linear(rows)
    output: Tensor = _Frozen.apply(rows, linear)  # type: ignore[no-untyped-call]  # torch's
    return output


class Inputs:
    """Rows that go into projections; in float32 as well, once for all that have updates."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @cached_property
    def wide(self) -> Tensor:
        """The rows in float32."""
        return self.rows.float()


def updated(
    output: Tensor, inputs: Inputs, updates: Sequence[tuple[LowRank, Factors]], dropout: Dropout
) -> Tensor:
    """`output` of a projection with the updates, added as peft does: in float32, rounded once."""
    for update, factors in updates:
        rows = dropout.of(inputs.wide, update)
        low = functional.linear(functional.linear(rows, factors.down), factors.up)
        output = torch.add(output.float(), low, alpha=update.scale).to(output.dtype)
    return output


class Dropout:
    """Dropout that a seed decides, so that a pass which is repeated, here or elsewhere, drops the same."""

    def __init__(self, seed: int) -> None:
        """Dropout by `seed`; 0 drops nothing."""
        self._seed = seed

    def of(self, rows: Tensor, update: LowRank) -> Tensor:
        """(tokens, features) with some values zeroed and the others scaled up, for one update."""
        if not (self._seed and update.dropout):
            return rows
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + _number(update))
        kept = torch.rand(rows.shape, generator=generator) >= update.dropout
        return rows * (kept.to(rows.device, rows.dtype) / (1 - update.dropout))


def _number(update: LowRank) -> int:
    """A number of its own for each projection of a model."""
    return update.block * 64 + sum(map(ord, update.projection)) % 61
