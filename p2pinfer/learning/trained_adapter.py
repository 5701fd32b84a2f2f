"""Adapter of a whole model as its trainer holds it, and the parts of it that hops are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pinfer.errors import LocalError
from p2pinfer.models.learning.adapter import AdapterLayout, Factors, LowRank
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.train_messages import Update
from p2pinfer.node.protocol.train_tensors import digest_of_adapter, encode_vector, updates_of


@dataclass(frozen=True, slots=True)
class SpanAdapter:
    """Part of an adapter for one hop, as it travels.

    Attributes:
        updates: Its layout.
        payload: Its values, float32.
    """

    updates: tuple[Update, ...]
    prompt_tokens: int
    payload: bytes
    digest: bytes


class ModelAdapter:
    """Values of an adapter at one moment, which must not change: an optimiser's step makes another one.

    Args:
        updates: The low-rank updates.
        factors: A and B of each of them.
        prompts: (num_blocks, prompt_tokens, hidden_size), or None.
    """

    def __init__(
        self,
        updates: Sequence[LowRank] = (),
        factors: Sequence[Factors] = (),
        prompts: Tensor | None = None,
    ) -> None:
        self.updates = tuple(updates)
        tensors = [each for pair in factors for each in pair]
        self._tensors = [_float(each) for each in tensors]
        self._prompts = None if prompts is None else _float(prompts)
        self._parts: dict[BlockSpan, SpanAdapter | None] = {}

    def part(self, span: BlockSpan) -> SpanAdapter | None:
        """The part for a hop that runs `span`; None if it changes none of its blocks.

        Raises:
            LocalError: A value is not finite.
        """
        if span not in self._parts:
            self._parts[span] = self._made(span)
        return self._parts[span]

    def _made(self, span: BlockSpan) -> SpanAdapter | None:
        chosen = self._chosen(span)
        if not chosen and self._prompts is None:
            return None
        prompt_tokens = 0 if self._prompts is None else self._prompts.shape[1]
        layout = AdapterLayout(tuple(self.updates[index] for index in chosen), prompt_tokens)
        parts = [self._tensors[2 * index + which].flatten() for index in chosen for which in (0, 1)]
        if self._prompts is not None:
            parts.append(self._prompts[span.start : span.stop].flatten())
        values = torch.cat(parts)
        if not bool(torch.isfinite(values).all()):
            raise LocalError("a value of the adapter is not finite: the training has diverged")
        payload, updates = encode_vector(values), updates_of(layout)
        return SpanAdapter(
            updates, prompt_tokens, payload, digest_of_adapter(updates, prompt_tokens, payload)
        )

    def _chosen(self, span: BlockSpan) -> list[int]:
        return [index for index, each in enumerate(self.updates) if span.start <= each.block < span.stop]

    def gradient(self) -> AdapterGradient:
        """A gradient of zeros in this adapter's form."""
        prompts = None if self._prompts is None else torch.zeros_like(self._prompts)
        return AdapterGradient(self, [torch.zeros_like(each) for each in self._tensors], prompts)


@dataclass(frozen=True, slots=True)
class AdapterGradient:
    """Gradient of an adapter, gathered from hops.

    Attributes:
        tensors: Of A and B of every update, in turn.
        prompts: Of the prompts, if there are any.
    """

    adapter: ModelAdapter
    tensors: list[Tensor]
    prompts: Tensor | None

    def add(self, span: BlockSpan, vector: Tensor) -> None:
        """Add what the hop of `span` returned for its part."""
        offset = 0
        for index, update in enumerate(self.adapter.updates):
            if span.start <= update.block < span.stop:
                for into in self.tensors[2 * index : 2 * index + 2]:
                    into += vector[offset : offset + into.numel()].view(into.shape)
                    offset += into.numel()
        if self.prompts is not None:
            into = self.prompts[span.start : span.stop]
            into += vector[offset : offset + into.numel()].view(into.shape)
            offset += into.numel()
        assert offset == len(vector), "a gradient of another adapter"


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()
