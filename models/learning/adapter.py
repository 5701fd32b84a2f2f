"""Adapters of a span: low-rank updates of its products, prefixes of its keys, prompts added to its inputs.

An adapter is a layout and one flat float32 vector, so that it has one digest, travels as one payload, and its
gradient has the same form. LoRA is E. Hu et al., arXiv 2106.09685; deep prompts are those of P-Tuning v2 (X.
Liu et al., arXiv 2110.07602) as Petals adds them: to the first hidden states of every block. Prefixes are X.
Li's and P. Liang's (arXiv 2101.00190), as peft has them: keys and values before those of every sequence. They
lie in the vector as an update, whose A are the keys and whose B are the values: no code but that of attention
has to know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.span import BlockSpan

ATTENTION: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP: Final = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PROJECTIONS: Final = (*ATTENTION, *MLP)
PREFIX: Final = "self_attn.prefix"  # no product, but keys and values; its rank is the number of its tokens


@dataclass(frozen=True, slots=True)
class LowRank:
    """One low-rank update: `scale * B (A x)` is added to what a projection gives.

    Attributes:
        block: Index of the block within the model.
        projection: One of `PROJECTIONS`, or `PREFIX`.
        rank: Rows of A, columns of B.
        scale: Factor of the update.
        dropout: Share of A's inputs that are zeroed while training, 0 to below 1.
    """

    block: int
    projection: str
    rank: int
    scale: float
    dropout: float = 0.0


class Factors(NamedTuple):
    """The two matrices of a low-rank update, float32."""

    down: Tensor  # A, (rank, in_features)
    up: Tensor  # B, (out_features, rank)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Order and shapes of an adapter's numbers, on one span.

    Attributes:
        updates: In the order in which their A and B lie in the vector.
        prompt_tokens: Hidden states of each block that a prompt is added to; 0 without prompts. The prompts,
            (blocks, prompt_tokens, hidden_size), lie behind the updates.
    """

    updates: tuple[LowRank, ...] = ()
    prompt_tokens: int = 0

    def size(self, architecture: Architecture, span: BlockSpan) -> int:
        """Number of values in the vector.

        Raises:
            ValueError: The model has no such projection, the span no such block, or a block two prefixes.
        """
        total = len(span) * self.prompt_tokens * architecture.hidden_size
        prefixes = [each.block for each in self.updates if each.projection == PREFIX]
        if len(prefixes) > len({*prefixes}):
            raise ValueError("two prefixes of one block")
        for update in self.updates:
            if not span.start <= update.block < span.stop:
                raise ValueError(f"an update of block {update.block}, which is not among {span}")
            inputs, outputs = _shape(architecture, update.projection)
            total += update.rank * (inputs + outputs)
        return total

    @property
    def is_low_rank(self) -> bool:
        """True if low-rank updates of products are all there is, which sessions can have."""
        return not self.prompt_tokens and all(each.projection != PREFIX for each in self.updates)


def projection_shape(architecture: Architecture, projection: str) -> tuple[int, int]:
    """In- and out-features of a projection.

    Raises:
        ValueError: A model of this family has no such product that takes an update.
    """
    shapes = architecture.projections
    if projection not in shapes:
        known = f"{', '.join(shapes)} are" if shapes else "this family has none"
        raise ValueError(f"{projection:.60} is no product that takes an adapter: {known}")
    return shapes[projection]


def _shape(architecture: Architecture, projection: str) -> tuple[int, int]:
    """Columns of A and rows of B: for a prefix the width of a token's keys, and that of its values."""
    if projection == PREFIX:
        width = architecture.kv_heads * architecture.head_dim
        return width, width
    return projection_shape(architecture, projection)


class Adapter:
    """An adapter of a span, ready to be applied.

    Attributes:
        layout: What its values are.
        values: (size,) float32, on the device that computes.
    """

    def __init__(
        self, layout: AdapterLayout, values: Tensor, architecture: Architecture, span: BlockSpan
    ) -> None:
        """An adapter of `values`, whose number is that of the layout.

        Raises:
            ValueError: It is not, or the layout does not fit the span.
        """
        expected = layout.size(architecture, span)
        if values.shape != (expected,) or values.dtype != torch.float32:
            raise ValueError(
                f"an adapter of {tuple(values.shape)} {values.dtype}: {expected} float32 expected"
            )
        self.layout = layout
        self.values = values
        self._architecture = architecture
        self._span = span
        self._updates_of: dict[int, list[tuple[LowRank, int]]] = {}
        offset = 0
        for update in layout.updates:
            self._updates_of.setdefault(update.block, []).append((update, offset))
            offset += update.rank * sum(_shape(architecture, update.projection))
        self._prompts_at = offset

    def to(self, device: torch.device) -> Adapter:
        """The same adapter on a device."""
        values = self.values.to(device)
        return self if values is self.values else Adapter(self.layout, values, self._architecture, self._span)

    def places(self, span: BlockSpan) -> Iterator[tuple[str, slice]]:
        """Name of each tensor that changes a block of `span`, and where in the vector it lies."""
        for block in range(span.start, span.stop):
            for update, offset in self._updates_of.get(block, ()):
                inputs, outputs = _shape(self._architecture, update.projection)
                middle, stop = offset + update.rank * inputs, offset + update.rank * (inputs + outputs)
                name = f"{update.projection} in block {block}"
                yield f"A of {name}", slice(offset, middle)
                yield f"B of {name}", slice(middle, stop)
            if tokens := self.layout.prompt_tokens:
                size = tokens * self._architecture.hidden_size
                start = self._prompts_at + (block - self._span.start) * size
                yield f"the prompt of block {block}", slice(start, start + size)

    def first_block(self, span: BlockSpan) -> int | None:
        """The first block of a part of its span that it changes; None if it changes none there."""
        if self.layout.prompt_tokens:
            return span.start
        return min((each for each in self._updates_of if span.start <= each < span.stop), default=None)

    def of_block(self, block: int, values: Tensor | None = None) -> BlockAdapter:
        """Part of the adapter in one block of the model, as views.

        Args:
            values: Another vector of the same layout, such as the gradient's, to be viewed instead.
        """
        vector = self.values if values is None else values
        updates = tuple(
            (update, self._factors(update, offset, vector))
            for update, offset in self._updates_of.get(block, ())
        )
        prompt: Tensor | None = None
        if tokens := self.layout.prompt_tokens:
            size = tokens * self._architecture.hidden_size
            start = self._prompts_at + (block - self._span.start) * size
            prompt = vector[start : start + size].view(tokens, -1)
        return BlockAdapter(updates, prompt)

    def _factors(self, update: LowRank, offset: int, vector: Tensor) -> Factors:
        inputs, outputs = _shape(self._architecture, update.projection)
        middle, stop = offset + update.rank * inputs, offset + update.rank * (inputs + outputs)
        return Factors(
            vector[offset:middle].view(update.rank, inputs), vector[middle:stop].view(outputs, update.rank)
        )


class BlockAdapter(NamedTuple):
    """The part of an adapter that one block has."""

    updates: Sequence[tuple[LowRank, Factors]] = ()
    prompt: Tensor | None = None  # (prompt_tokens, hidden_size)

    def tensors(self) -> Iterator[Tensor]:
        """Its tensors: A and B of each update, then the prompt."""
        for _, factors in self.updates:
            yield from factors
        if self.prompt is not None:
            yield self.prompt

    def with_gradients(self) -> BlockAdapter:
        """The same values as leaves of a graph of their own."""
        updates = tuple(
            (update, Factors(*(each.detach().requires_grad_() for each in factors)))
            for update, factors in self.updates
        )
        prompt = None if self.prompt is None else self.prompt.detach().requires_grad_()
        return BlockAdapter(updates, prompt)

    def to(self, device: torch.device) -> BlockAdapter:
        """The same values on a device, where gradients come back from; itself where it lies there."""
        if all(each.device == device for each in self.tensors()):
            return self
        updates = tuple(
            (update, Factors(*(each.to(device) for each in factors))) for update, factors in self.updates
        )
        return BlockAdapter(updates, None if self.prompt is None else self.prompt.to(device))

    def on(self, projection: str) -> list[tuple[LowRank, Factors]]:
        """The updates of one projection."""
        return [(update, factors) for update, factors in self.updates if update.projection == projection]

    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values before those of every sequence, (prefix tokens, kv_heads * head_dim) each."""
        for _, factors in self.on(PREFIX):
            return factors.down, factors.up.t()
        return None


NO_ADAPTER: Final = BlockAdapter()
