"""Adapter that a tuner trains: its parameters, what hops are sent of them, and their gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p2pinfer.errors import ConfigError
from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.learning.adapter import PROJECTIONS, Factors, LowRank, projection_shape

from .trained_adapter import AdapterGradient, ModelAdapter


class TunedAdapter:
    """LoRA of a model's products, or a prompt of virtual tokens before every text; float32.

    Attributes:
        updates: The low-rank updates; none for a prompt.
        factors: A and B of each of them, in turn.
        prompt: (tokens, hidden_size), what enters block 0 before the text; None for LoRA.
    """

    def __init__(
        self, updates: Sequence[LowRank] = (), factors: Sequence[Tensor] = (), prompt: Tensor | None = None
    ) -> None:
        assert len(factors) == 2 * len(updates) and (prompt is None) == bool(updates)
        self.updates = tuple(updates)
        self.factors = [nn.Parameter(each.detach().float().clone()) for each in factors]
        self.prompt = None if prompt is None else nn.Parameter(prompt.detach().float().clone())
        self._snapshot: ModelAdapter | None = None

    @property
    def prompt_tokens(self) -> int:
        """Virtual tokens before every text."""
        return 0 if self.prompt is None else len(self.prompt)

    def parameters(self) -> list[nn.Parameter]:
        """Tensors that an optimiser changes."""
        return [*self.factors, *(() if self.prompt is None else (self.prompt,))]

    def snapshot(self) -> ModelAdapter | None:
        """The values of this moment for hops; None for a prompt, which does not travel."""
        if self.updates and self._snapshot is None:
            copies = [each.detach().clone() for each in self.factors]
            pairs = [Factors(*copies[at : at + 2]) for at in range(0, len(copies), 2)]
            self._snapshot = ModelAdapter(self.updates, pairs)
        return self._snapshot

    def changed(self) -> None:
        """Take note that an optimiser has changed the values."""
        self._snapshot = None

    def zeros(self) -> list[Tensor]:
        """A gradient of zeros for each parameter."""
        return [torch.zeros_like(each) for each in self.parameters()]

    @staticmethod
    def add(into: Sequence[Tensor], gradient: AdapterGradient | None, of_prompt: Tensor | None) -> None:
        """Add what a pass returned to a gradient in the order of `parameters`."""
        found = gradient.tensors if gradient is not None else [of_prompt]
        for total, part in zip(into, found, strict=True):
            assert part is not None
            total += part


def new_lora(
    architecture: Architecture, blocks: int, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> TunedAdapter:
    """LoRA that changes nothing yet, initialised as peft does: A uniform, B zero.

    Args:
        targets: Products by their last name, such as `q_proj`; all that take an update if empty.

    Raises:
        ConfigError: The model has no such product.
    """
    known: dict[str, str] = {}
    for projection in PROJECTIONS:
        try:
            projection_shape(architecture, projection)
        except ValueError:  # of experts, which take none, or by another name in this family
            continue
        known[projection.rpartition(".")[2]] = projection
    if not known:
        raise ConfigError("no product of this model's family takes LoRA here; tune a prompt instead")
    if strange := sorted(set(targets) - known.keys()):
        raise ConfigError(
            f"this model has no product {strange[0]} that takes LoRA; it has {', '.join(known)}"
        )
    chosen = [known[name] for name in known if not targets or name in targets]
    generator = torch.Generator().manual_seed(seed)
    updates: list[LowRank] = []
    factors: list[Tensor] = []
    for block in range(blocks):
        for projection in chosen:
            inputs, outputs = projection_shape(architecture, projection)
            updates.append(LowRank(block, projection, rank, alpha / rank))
            bound = 1 / math.sqrt(inputs)  # kaiming_uniform_ with a = sqrt(5)
            down = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
            factors += [down, torch.zeros(outputs, rank)]
    return TunedAdapter(updates, factors)


def new_prompt(rows: Tensor) -> TunedAdapter:
    """A prompt that begins as the embeddings of some tokens, (tokens, hidden_size)."""
    return TunedAdapter(prompt=rows)
