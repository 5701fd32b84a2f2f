"""Adapter of a whole model as its trainer holds it, and the parts of it that hops are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pinfer.errors import LocalError
from p2pinfer.models.learning.adapter import Factors, LowRank
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.span_adapter import SpanAdapter, part_of


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
        try:
            return part_of(span, self.updates, self._tensors, self._prompts)
        except ValueError as exc:
            raise LocalError("a value of the adapter is not finite: the training has diverged") from exc

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
