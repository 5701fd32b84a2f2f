"""Feed-forward layer of a block: gated or not, or a router's choice of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .architecture import Architecture
from .families import ExpertNames
from .fused_experts import read_fused
from .layers import AnyLinear
from .updates import RowUpdates
from .weights import Weights


class ExpertChoice(Protocol):
    """Decision on the experts of each token, block by block."""

    def choose(self, block: int, scores: Tensor, count: int) -> Tensor:
        """Experts of a batch's tokens in a block.

        Args:
            block: Index within the model.
            scores: (tokens, experts) float32, what the router gives, before the softmax.
            count: How many experts a token goes to.

        Returns:
            (tokens, count) int64, in any order.
        """
        ...


class FeedForward:
    """`down(activation(gate(x)) * up(x))`, gate and up being one product; or `down(activation(up(x)))`.

    Attributes:
        gated: Whether there is a gate.
        gate_up: The products of gate and up, side by side; that of up alone without a gate.
        down: The product of what they give.
    """

    def __init__(self, architecture: Architecture, gate_up: AnyLinear, down: AnyLinear) -> None:
        self.gated = architecture.family.gated
        self.gate_up = gate_up
        self.down = down
        self._activation = architecture.activation
        self._clamp = architecture.clamp

    def inner(self, both: Tensor) -> Tensor:
        """Input of `down`, made of the output of `gate_up`; differentiable."""
        if not self.gated:
            return self._activation(both)
        gate, up = both.chunk(2, -1)
        if self._clamp is not None:
            factor, limit = self._clamp
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * (gate * torch.sigmoid(gate * factor))
        if both.requires_grad:  # a gradient needs what some activations gave
            return self._activation(gate) * up
        return self._activation(gate).mul_(up)

    def __call__(self, rows: Tensor) -> Tensor:
        return self.down(self.inner(self.gate_up(rows)))

    def updated(self, rows: Tensor, block: int, updates: RowUpdates) -> Tensor:
        """The same with low-rank updates of this block's products."""
        both = self.gate_up(rows)
        updates.add(block, "gate_up", rows, both)
        inner = self.inner(both)
        output = self.down(inner)
        updates.add(block, "down", inner, output)
        return output


class ExpertMlp:
    """The sum of the `experts_per_token` layers that a token's router likes best, weighted by how much.

    Attributes:
        router: The product that gives each expert's score.
        experts: The layers.
        experts_per_token: How many of them a token goes to.
        shared: One that all tokens go to, beside them; None: there is none.
        shared_gate: The product whose sigmoid weighs that one's output.
    """

    def __init__(self, architecture: Architecture, weights: Weights, names: ExpertNames) -> None:
        count, hidden = architecture.num_experts, architecture.hidden_size
        self.experts_per_token = architecture.experts_per_token
        self._choose: Callable[[Tensor, int], Tensor] = _likeliest
        self._renormalised = architecture.renormalised
        self.router = weights.linear((names.router,), hidden, (count,), bias=names.router_bias, whole=True)
        self.experts: list[FeedForward]
        if names.fused:
            self.experts = [
                FeedForward(architecture, *pair) for pair in read_fused(architecture, weights, names)
            ]
        else:
            self.experts = [
                _load(architecture, weights, prefix, names, architecture.expert_size)
                for prefix in map(names.expert.format, range(count))
            ]
        self.shared: FeedForward | None = None
        self.shared_gate: AnyLinear | None = None
        if names.shared:
            self.shared = _load(architecture, weights, names.shared, names, architecture.shared_size)
            self.shared_gate = weights.linear((names.shared_gate,), hidden, (1,), whole=True)

    def choosing(self, block: int, choice: ExpertChoice) -> ExpertMlp:
        """The same layer on the same weights, which is that of `block`; `choice` decides on the experts."""
        other = copy(self)
        other._choose = partial(choice.choose, block)
        return other

    def weigh(self, scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Experts of each token and their weights, both (tokens, count), of the router's float32 scores."""
        chosen = self._choose(scores, self.experts_per_token)
        odds = scores.softmax(-1).gather(-1, chosen)
        if self._renormalised:
            odds = odds / odds.sum(-1, keepdim=True)
        return chosen, odds.to(dtype)

    def __call__(self, rows: Tensor) -> Tensor:
        chosen, odds = self.weigh(self.router(rows).float(), rows.dtype)
        output = torch.zeros_like(rows)
        for index in sorted({int(expert) for expert in chosen.flatten()}):
            token, rank = torch.where(chosen == index)
            output.index_add_(0, token, self.experts[index](rows[token]) * odds[token, rank, None])
        if self.shared is not None and self.shared_gate is not None:
            output += self.shared_gate(rows).sigmoid() * self.shared(rows)
        return output


def _likeliest(scores: Tensor, count: int) -> Tensor:
    """(tokens, count): the experts that the router likes best, the best one first."""
    return scores.topk(count, dim=-1).indices


def load_mlp(architecture: Architecture, weights: Weights, block: int) -> FeedForward | ExpertMlp:
    """The layer of a block as the family lays it out."""
    family = architecture.family
    if family.experts is not None and block not in architecture.dense_blocks:
        return ExpertMlp(architecture, weights, family.experts)
    return load_dense(architecture, weights, family.gate_up, family.down, architecture.inner_size)


def load_dense(
    architecture: Architecture, weights: Weights, gate_up: Sequence[str], down: str, inner: int
) -> FeedForward:
    """A layer of products with these names."""
    hidden, bias = architecture.hidden_size, architecture.mlp_bias
    whole = 2 * inner if architecture.family.gated else inner
    first = weights.linear(gate_up, hidden, [whole // len(gate_up)] * len(gate_up), bias=bias)
    return FeedForward(architecture, first, weights.linear((down,), inner, (hidden,), bias=bias))


def _load(
    architecture: Architecture, weights: Weights, prefix: str, names: ExpertNames, inner: int
) -> FeedForward:
    gate_up = [f"{prefix}.{part}" for part in (names.gate, names.up)]
    return load_dense(architecture, weights, gate_up, f"{prefix}.{names.down}", inner)
