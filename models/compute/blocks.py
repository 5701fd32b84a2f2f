"""Transformer blocks of a span: one forward pass over a packed batch, for every family.

A batch is (tokens, hidden_size), the tokens of all sequences one after the other; what belongs to which
sequence is the attention's business alone. transformers gives the answers that the tests compare with.

Its own layers, with the same packed products, attention and cache, were tried and are slower by 0.15 ms a
block: 1.90 ms against 2.93 for a step of the bundled model in bfloat16, 12.5 against 16.3 for SmolLM2, 15.4
against 17.9 for 16 blocks of 1024 (one core of an AMD EPYC, torch 2.13, CPU time). Their three projections
are three calls, their norms five, their rotation ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import NamedTuple

from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.progress import Progress, Silent
from p2pinfer.models.span import BlockSpan

from .attention import Attention
from .families import Architecture, describe_architecture
from .layers import Linear, Norm
from .mlp import ExpertMlp, GatedMlp, load_mlp
from .rope import Rope, Rotation, rotate
from .routing import ExpertChoice
from .target import Target
from .updates import RowUpdates
from .weights import Weights

# Left behind by checkpoints of old; it is computed.
_RECOMPUTED = "rotary_emb.inv_freq"


class BlockLayers(NamedTuple):
    """The layers of one block, for whoever runs them in another way than `Blocks.forward`."""

    attention_norm: Norm
    qkv: Linear  # queries, keys and values, side by side
    query_norm: Norm | None
    key_norm: Norm | None
    output: Linear
    attention_output_norm: Norm | None
    mlp_norm: Norm
    mlp: GatedMlp | ExpertMlp
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
        rope: Rope,
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
        self._rope = rope
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

    def rotation(self, positions: Tensor) -> Rotation:
        """The rotation of tokens at `positions`, (tokens,)."""
        return self._rope.at(positions, self.dtype)

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
        rotation = self._rope.at(attention.positions, self.dtype)
        for index in range(part.start - self.span.start, part.stop - self.span.start):
            changes = None if updates is None else (self.span.start + index, updates)
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
            weights = Weights(checkpoint, f"model.layers.{index}.", block_names, target, progress)
            blocks.append(_Block(architecture, weights))
            weights.finish()
    finally:
        progress.done()
    return Blocks(checkpoint.spec, span, architecture, target, Rope(checkpoint.config, target.device), blocks)


class _Block:
    """One transformer block."""

    def __init__(self, architecture: Architecture, weights: Weights) -> None:
        family, hidden, size = architecture.family, architecture.hidden_size, architecture.head_dim
        self._heads = architecture.heads
        self._turned = architecture.heads + architecture.kv_heads  # heads that know their position
        self._head_shape = (architecture.heads + 2 * architecture.kv_heads, size)
        widths = (architecture.heads * size, architecture.kv_heads * size, architecture.kv_heads * size)
        norm: Callable[[str, int], Norm] = partial(
            weights.norm, eps=architecture.norm_eps, offset=family.norm_offset
        )

        self._attention_norm = norm(family.attention_norm, hidden)
        self._qkv = weights.linear(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            hidden,
            widths,
            bias=architecture.query_bias,
        )
        self._query_norm = norm("self_attn.q_norm", size) if family.head_norms else None
        self._key_norm = norm("self_attn.k_norm", size) if family.head_norms else None
        self._output = weights.linear(
            ("self_attn.o_proj",), widths[0], (hidden,), bias=architecture.output_bias
        )
        output_norm = family.attention_output_norm
        self._attention_output_norm = norm(output_norm, hidden) if output_norm else None
        self._mlp_norm = norm(family.mlp_norm, hidden)
        self._mlp = load_mlp(architecture, weights)
        output_norm = family.mlp_output_norm
        self._mlp_output_norm = norm(output_norm, hidden) if output_norm else None
        self._stepwise = False

    def layers(self) -> BlockLayers:
        return BlockLayers(
            self._attention_norm,
            self._qkv,
            self._query_norm,
            self._key_norm,
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
            if isinstance(part, Norm):
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
        rotation: Rotation,
        attention: Attention,
        changes: tuple[int, RowUpdates] | None = None,
    ) -> Tensor:
        normed = self._attention_norm(hidden)
        product = self._qkv(normed)
        if changes is not None:
            block, updates = changes
            updates.add(block, "qkv", normed, product)
        heads = product.view(len(hidden), *self._head_shape)
        queries, keys = heads[:, : self._heads], heads[:, self._heads : self._turned]
        if self._query_norm and self._key_norm:
            queries.copy_(self._query_norm(queries))
            keys.copy_(self._key_norm(keys))
        rotate(heads[:, : self._turned], rotation, stepwise=self._stepwise)
        attended = attention.attend(index, queries, heads[:, self._heads :])
        output = self._output(attended)
        if changes is not None:
            block, updates = changes
            updates.add(block, "output", attended, output)
        if self._attention_output_norm:
            output = self._attention_output_norm(output)
        hidden = output.add_(hidden)
        if changes is not None and isinstance(self._mlp, GatedMlp):
            output = self._mlp.updated(self._mlp_norm(hidden), *changes)
        else:
            output = self._mlp(self._mlp_norm(hidden))
        if self._mlp_output_norm:
            output = self._mlp_output_norm(output)
        return output.add_(hidden)
