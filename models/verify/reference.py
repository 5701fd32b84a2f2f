"""References for outputs: a span in two precisions, and everything behind it up to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.compute.runner import SpanRunner, open_runner
from p2pinfer.models.compute.updates import SpanUpdates
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.numerics import BFLOAT16, FLOAT32, Numerics
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

_PAGE_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Reference:
    """A span to hold others' outputs against. Belongs to one thread at a time.

    Attributes:
        exact: Runs it in float32; where `numerics` are quantised, with the same weights as they.
        rounded: Run it in `numerics`, with fused kernels and stepwise; they share weights and cache.
        max_tokens: How long a session may be.
    """

    exact: SpanRunner
    rounded: Sequence[SpanRunner]
    max_tokens: int

    def adapted(self, updates: SpanUpdates) -> Reference:
        """The same span with an adapter."""
        exact, rounded = self.exact.adapted(updates), [each.adapted(updates) for each in self.rounded]
        return Reference(exact, rounded, self.max_tokens)

    @property
    def numerics(self) -> Numerics:
        """Numerics whose rounding is the unit: see `p2pinfer.models.numerics.reference_for`."""
        return self.rounded[0].numerics

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.exact.spec

    @property
    def span(self) -> BlockSpan:
        """The blocks that can be looked at, or any part of them."""
        return self.exact.span


@dataclass(frozen=True, slots=True)
class Tail:
    """Everything after a span, up to the logits, in float32. Belongs to one thread at a time.

    Attributes:
        runner: Holds the blocks after the span; None where it is the last one.
        embedding_and_head: Norm and head.
        span: Those of the runner's blocks that follow; all of them if None.
    """

    runner: SpanRunner | None
    embedding_and_head: EmbeddingAndHead
    span: BlockSpan | None = None


def open_reference(
    checkpoint: Checkpoint,
    span: BlockSpan,
    *,
    max_tokens: int,
    numerics: Numerics = BFLOAT16,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Reference:
    """Load a span, in float32 and in `numerics`, whose rounding is what deviations are measured in.

    Quantised weights are held as what they stand for, so plain products judge the kernels that read them.

    With bfloat16 it takes six bytes a weight, and as many for each key and value of `max_tokens`.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ConfigError: Nothing here computes in `numerics`.
        SpanOutOfRange: The model has no such blocks.
    """
    exact, rounded = (
        _open(checkpoint, span, each, max_tokens, device, progress) for each in (numerics.exact, numerics)
    )
    return Reference(exact, (rounded, rounded.stepwise()), max_tokens)


def open_tail(
    checkpoint: Checkpoint,
    span: BlockSpan,
    *,
    max_tokens: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Tail:
    """Load what follows `span`, in float32.

    Raises:
        CheckpointError: The checkpoint cannot be used, or lacks these tensors.
    """
    blocks = checkpoint.spec.num_blocks
    runner = None
    if span.stop < blocks:
        rest = BlockSpan(span.stop, blocks)
        runner = _open(checkpoint, rest, FLOAT32, max_tokens, device, progress)
    config = ComputeConfig(device=device, dtype="float32")
    return Tail(runner, load_embedding_and_head(checkpoint, config, progress=progress))


def tail_of(reference: Reference, embedding_and_head: EmbeddingAndHead, start: int) -> Tail:
    """Tail of a span that ends before block `start`, with a reference's own blocks.

    Raises:
        ValueError: It does not hold all of them.
    """
    stop = reference.spec.num_blocks
    if start == stop:
        return Tail(None, embedding_and_head)
    rest = BlockSpan(start, stop)
    if not reference.span.covers(rest):
        raise ValueError(f"blocks {rest} are not all among {reference.span}")
    return Tail(reference.exact, embedding_and_head, rest)


def _open(
    checkpoint: Checkpoint,
    span: BlockSpan,
    numerics: Numerics,
    max_tokens: int,
    device: str,
    progress: Progress | None,
) -> SpanRunner:
    pages = -(-max_tokens // _PAGE_TOKENS)
    per_token = checkpoint.spec.kv_bytes_per_token_per_block(numerics) * len(span)
    config = ComputeConfig(
        device=device,
        dtype=numerics.compute if numerics.is_quantised else str(numerics),
        weights=numerics.weights if numerics.is_quantised else "auto",
        cache_bytes=pages * _PAGE_TOKENS * per_token,
        page_tokens=_PAGE_TOKENS,
    )
    return open_runner(checkpoint, span, config, progress=progress, laid_out=True)
