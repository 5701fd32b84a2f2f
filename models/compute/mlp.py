"""Feed-forward layer of a block: gated, or a router's choice of experts."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial

import torch
from torch import Tensor

from .families import Architecture, ExpertNames
from .routing import ExpertChoice
from .updates import RowUpdates
from .weights import Weights


class GatedMlp:
    """`down(activation(gate(x)) * up(x))`, gate and up being one product.

    Attributes:
        activation: Function of the gate's product.
        gate_up: The products of gate and up, side by side.
        down: The product of what they give.
    """

    def __init__(self, architecture: Architecture, weights: Weights, gate: str, up: str, down: str) -> None:
        hidden, inner, bias = architecture.hidden_size, architecture.inner_size, architecture.mlp_bias
        self.activation = architecture.activation
        self.gate_up = weights.linear((gate, up), hidden, (inner, inner), bias=bias)
        self.down = weights.linear((down,), inner, (hidden,), bias=bias)

    def __call__(self, rows: Tensor) -> Tensor:
        gate, up = self.gate_up(rows).chunk(2, -1)
        return self.down(self.activation(gate).mul_(up))

    def updated(self, rows: Tensor, block: int, updates: RowUpdates) -> Tensor:
        """The same with low-rank updates of this block's products."""
        both = self.gate_up(rows)
        updates.add(block, "gate_up", rows, both)
        gate, up = both.chunk(2, -1)
        inner = self.activation(gate).mul_(up)
        output = self.down(inner)
        updates.add(block, "down", inner, output)
        return output


class ExpertMlp:
    """The sum of the `experts_per_token` layers that a token's router likes best, weighted by how much.

    Attributes:
        router: The product that gives each expert's score.
        experts: The layers.
        experts_per_token: How many of them a token goes to.
    """

    def __init__(self, architecture: Architecture, weights: Weights, names: ExpertNames) -> None:
        count = architecture.num_experts
        self.experts_per_token = architecture.experts_per_token
        self._choose: Callable[[Tensor, int], Tensor] = _likeliest
        self.router = weights.linear((names.router,), architecture.hidden_size, (count,))
        self.experts = [
            GatedMlp(
                architecture, weights, *(f"{prefix}.{part}" for part in (names.gate, names.up, names.down))
            )
            for prefix in map(names.expert.format, range(count))
        ]

    def choosing(self, block: int, choice: ExpertChoice) -> ExpertMlp:
        """The same layer on the same weights, which is that of `block`; `choice` decides on the experts."""
        other = copy(self)
        other._choose = partial(choice.choose, block)
        return other

    def __call__(self, rows: Tensor) -> Tensor:
        scores = self.router(rows).float()
        chosen = self._choose(scores, self.experts_per_token)
        odds = scores.softmax(-1).gather(-1, chosen)
        odds = (odds / odds.sum(-1, keepdim=True)).to(rows.dtype)
        output = torch.zeros_like(rows)
        for index in sorted({int(expert) for expert in chosen.flatten()}):
            token, rank = torch.where(chosen == index)
            output.index_add_(0, token, self.experts[index](rows[token]) * odds[token, rank, None])
        return output


def _likeliest(scores: Tensor, count: int) -> Tensor:
    """(tokens, count): the experts that the router likes best, the best one first."""
    return scores.topk(count, dim=-1).indices


def load_mlp(architecture: Architecture, weights: Weights) -> GatedMlp | ExpertMlp:
    """The layer as the family lays it out."""
    experts = architecture.family.experts
    if experts is not None:
        return ExpertMlp(architecture, weights, experts)
    return GatedMlp(architecture, weights, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
