"""Transformer blocks of a span: one forward pass over a packed batch, for every family.

A batch is (tokens, hidden_size), the tokens of all sequences one after the other; what belongs to which
sequence is the attention's business alone. transformers gives the answers that the tests compare with.

Its own layers, with the same packed products, attention and cache, were tried and are slower by 0.15 ms a
block: 1.90 ms against 2.93 for a step of the bundled model in bfloat16, 12.5 against 16.3 for SmolLM2, 15.4
against 17.9 for 16 blocks of 1024 (one core of an AMD EPYC, torch 2.13, CPU time). Their three projections
are three calls, their norms five, their rotation ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.progress import Progress, Silent
from p2pinfer.models.span import BlockSpan

from .architecture import Architecture, describe_architecture
from .attention import Attention
from .layers import AnyLinear, HeadNorm, Norm, is_norm
from .mlp import ExpertChoice, ExpertMlp, FeedForward, load_mlp
from .rope import Ropes, Rotation, rotate
from .target import Target
from .updates import RowUpdates
from .weights import Weights

# Left behind by checkpoints of old; it is computed.
_RECOMPUTED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


class BlockLayers(NamedTuple):
    """The layers of one block, for whoever runs them in another way than `Blocks.forward`."""

    attention_norm: Norm | None
    qkv: AnyLinear  # queries, keys and values, side by side
    query_norm: HeadNorm | None
    key_norm: HeadNorm | None
    sinks: Tensor | None
    output: AnyLinear
    attention_output_norm: Norm | None
    mlp_norm: Norm | None
    mlp: FeedForward | ExpertMlp
    mlp_output_norm: Norm | None


class Blocks:
    """The blocks of a span, their weights on one device.

    Attributes:
        spec: The model.
        numerics: What its weights are stored as, and what it computes in.
        span: Which of its blocks these are.
        architecture: Their shape.
        windows: How far each of them sees, or None for all the way.
        rounds_stepwise: Whether every operation rounds by itself.
    """

    def __init__(
        self,
        spec: ModelSpec,
        span: BlockSpan,
        architecture: Architecture,
        target: Target,
        ropes: Ropes,
        blocks: Sequence[_Block],
    ) -> None:
        self.spec = spec
        self.span = span
        self.architecture = architecture
        self.windows = architecture.windows[span.start : span.stop]
        self.device = target.device
        self.numerics = target.numerics
        self.dtype = target.dtype
        self.rounds_stepwise = False
        self._ropes = ropes
        self._blocks = blocks

    def stepwise(self) -> Blocks:
        """The same blocks on the same weights, rounding after every operation that the formulas have.

        Plain implementations do, transformers' eager one for instance, and are a little less accurate for it.
        """
        plain = copy(self)
        plain.rounds_stepwise = True
        plain._blocks = [block.stepwise() for block in self._blocks]
        return plain

    def choosing(self, choice: ExpertChoice) -> Blocks:
        """The same blocks on the same weights, where `choice` decides which experts a token goes to."""
        other = copy(self)
        other._blocks = [
            block.choosing(self.span.start + index, choice) for index, block in enumerate(self._blocks)
        ]
        return other

    def layers(self, index: int) -> BlockLayers:
        """The layers of the block with this index within the span."""
        return self._blocks[index].layers()

    def rotations(self, positions: Tensor) -> Sequence[Rotation | None]:
        """The rotation of tokens at `positions`, (tokens,), in each block of the model."""
        return self._ropes.at(positions, self.dtype)

    def forward(
        self,
        hidden: Tensor,
        attention: Attention,
        span: BlockSpan | None = None,
        updates: RowUpdates | None = None,
    ) -> Tensor:
        """Hidden states after the span, or after the part of it that `span` names.

        Args:
            hidden: (tokens, hidden_size), the blocks' dtype and device; left as it is.
            attention: Which tokens these are; its cache is extended.
            updates: Low-rank updates of some of the rows.
        """
        part = self.span if span is None else span
        rotations = self._ropes.at(attention.positions, self.dtype)
        for index in range(part.start - self.span.start, part.stop - self.span.start):
            changes = None if updates is None else (self.span.start + index, updates)
            rotation = rotations[self.span.start + index]
            hidden = self._blocks[index].forward(index, hidden, rotation, attention, changes)
        return hidden


def load_blocks(
    checkpoint: Checkpoint,
    span: BlockSpan,
    target: Target,
    *,
    progress: Progress | None = None,
) -> Blocks:
    """Read the span's weights, one tensor after the other, and nothing else of the checkpoint.

    Raises:
        CheckpointError: A tensor is missing, is misshapen, or is one that nothing here computes with.
        SpanOutOfRange: The model has no such blocks.
    """
    checkpoint.spec.check_span(span)
    architecture = describe_architecture(checkpoint.config)
    progress = progress or Silent()
    names = {
        index: frozenset(name for name in checkpoint.block_names(index) if not name.endswith(_RECOMPUTED))
        for index in range(span.start, span.stop)
    }
    progress.start(f"loading blocks {span}", sum(map(checkpoint.bytes_of, names.values())))
    try:
        blocks: list[_Block] = []
        for index, block_names in names.items():
            prefix = architecture.family.block.format(index)
            weights = Weights(checkpoint, prefix, block_names, target, progress)
            blocks.append(_Block(architecture, weights, index))
            weights.finish()
    finally:
        progress.done()
    ropes = Ropes(checkpoint.config, architecture, target.device)
    return Blocks(checkpoint.spec, span, architecture, target, ropes, blocks)


class _Block:
    """One transformer block."""

    def __init__(self, architecture: Architecture, weights: Weights, number: int) -> None:
        family, hidden, size = architecture.family, architecture.hidden_size, architecture.head_dim
        heads, kv_heads = architecture.heads, architecture.kv_heads
        self._heads = heads
        self._turned = heads + kv_heads  # heads that know their position
        self._head_shape = (heads + 2 * kv_heads, size)
        self._parallel = family.parallel
        self._scale = architecture.residual_scale
        self._stepwise = False

        self._attention_norm = _norm(architecture, weights, family.attention_norm)
        self._qkv = _load_qkv(architecture, weights)
        self._query_norm, self._key_norm = _load_head_norms(architecture, weights)
        self._sinks = weights.scores(family.sinks, heads) if family.sinks else None
        self._output = weights.linear(
            (family.output,), heads * size, (hidden,), bias=architecture.output_bias
        )
        self._attention_output_norm = _norm(architecture, weights, family.attention_output_norm)
        self._mlp_norm = _norm(architecture, weights, family.mlp_norm)
        self._mlp = load_mlp(architecture, weights, number)
        self._mlp_output_norm = _norm(architecture, weights, family.mlp_output_norm)

    def layers(self) -> BlockLayers:
        return BlockLayers(
            self._attention_norm,
            self._qkv,
            self._query_norm,
            self._key_norm,
            self._sinks,
            self._output,
            self._attention_output_norm,
            self._mlp_norm,
            self._mlp,
            self._mlp_output_norm,
        )

    def stepwise(self) -> _Block:
        plain = copy(self)
        plain._stepwise = True
        for name, part in vars(self).items():
            if is_norm(part):
                setattr(plain, name, part.stepwise())
        return plain

    def choosing(self, number: int, choice: ExpertChoice) -> _Block:
        other = copy(self)
        if isinstance(self._mlp, ExpertMlp):
            other._mlp = self._mlp.choosing(number, choice)
        return other

    def forward(
        self,
        index: int,
        hidden: Tensor,
        rotation: Rotation | None,
        attention: Attention,
        changes: tuple[int, RowUpdates] | None = None,
    ) -> Tensor:
        normed = hidden if self._attention_norm is None else self._attention_norm(hidden)
        attended = self._attend(index, normed, rotation, attention, changes)
        if self._scale != 1:
            attended *= self._scale
        if self._parallel:
            seen = normed if self._mlp_norm is None else self._mlp_norm(hidden)
            return attended.add_(hidden).add_(self._feed(seen, changes))
        hidden = attended.add_(hidden)
        output = self._feed(hidden if self._mlp_norm is None else self._mlp_norm(hidden), changes)
        if self._scale != 1:
            output *= self._scale
        return output.add_(hidden)

    def _attend(
        self,
        index: int,
        normed: Tensor,
        rotation: Rotation | None,
        attention: Attention,
        changes: tuple[int, RowUpdates] | None,
    ) -> Tensor:
        product = self._qkv(normed)
        if changes is not None:
            block, updates = changes
            updates.add(block, "qkv", normed, product)
        heads = product.view(len(normed), *self._head_shape)
        queries, keys = heads[:, : self._heads], heads[:, self._heads : self._turned]
        if self._query_norm is not None and self._key_norm is not None:
            queries.copy_(self._query_norm(queries))
            keys.copy_(self._key_norm(keys))
        if rotation is not None:
            rotate(heads[:, : self._turned], rotation, stepwise=self._stepwise)
        attended = attention.attend(index, queries, heads[:, self._heads :], self._sinks)
        output = self._output(attended)
        if changes is not None:
            block, updates = changes
            updates.add(block, "output", attended, output)
        return output if self._attention_output_norm is None else self._attention_output_norm(output)

    def _feed(self, seen: Tensor, changes: tuple[int, RowUpdates] | None) -> Tensor:
        if changes is not None and isinstance(self._mlp, FeedForward):
            output = self._mlp.updated(seen, *changes)
        else:
            output = self._mlp(seen)
        return output if self._mlp_output_norm is None else self._mlp_output_norm(output)


def _norm(architecture: Architecture, weights: Weights, name: str | None, *shape: int) -> Norm | None:
    """A norm of the family's kind, of the hidden size unless a shape is given; None without a name."""
    if name is None:
        return None
    family, shape = architecture.family, shape or (architecture.hidden_size,)
    if family.norm == "layer":
        return weights.layer_norm(name, *shape, eps=architecture.norm_eps, bias=family.norm_bias)
    return weights.norm(name, *shape, eps=architecture.norm_eps, offset=family.norm_offset)


def _load_head_norms(architecture: Architecture, weights: Weights) -> tuple[HeadNorm | None, HeadNorm | None]:
    """Norms of queries and keys."""
    family, size = architecture.family, architecture.head_dim
    norms: list[HeadNorm | None] = []
    for name, heads in zip(family.head_norm_names, (architecture.heads, architecture.kv_heads), strict=True):
        shapes = {"each head": (size,), "all heads": (heads * size,), "own of each head": (heads, size)}
        shape = shapes.get(family.head_norms)
        norm = _norm(architecture, weights, name, *shape) if shape else None
        norms.append(None if norm is None else HeadNorm(norm, joined=family.head_norms == "all heads"))
    return norms[0], norms[1]


def _load_qkv(architecture: Architecture, weights: Weights) -> AnyLinear:
    """The product of queries, keys and values side by side, however the family stores them."""
    family, hidden = architecture.family, architecture.hidden_size
    heads, kv_heads, size = architecture.heads, architecture.kv_heads, architecture.head_dim
    widths = (heads * size, kv_heads * size, kv_heads * size)
    if len(family.qkv) == 3:
        return weights.linear(family.qkv, hidden, widths, bias=architecture.query_bias)
    order: Tensor | None = None
    if family.grouped:
        stored = torch.arange(sum(widths)).view(kv_heads, -1, size)  # by key head: queries, key, value
        order = torch.cat([stored[:, :-2].flatten(), stored[:, -2].flatten(), stored[:, -1].flatten()])
    return weights.linear(family.qkv, hidden, (sum(widths),), bias=architecture.query_bias, order=order)
