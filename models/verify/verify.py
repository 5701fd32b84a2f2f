"""Recomputation of a span, to measure how far a peer's outputs lie from it.

The whole session goes through in one pass of pieces, as prompts do, in float32 and twice in bfloat16, which
costs a small part of what decoding it token by token did. Nothing here judges: `reputation.verdict` does, and
`node.verify` puts the two together.

What is compared are numbers as they were on the wire. All codecs there are carry floating point, so the
rounded run is put through the codec and values are compared; a codec with integer codes would have to
compare codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.compute.layers import padded_rows
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.numerics import BFLOAT16, FLOAT32, Numerics
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

from .deviation import ChunkDeviation, Deviation, LogitDeviation
from .noise_floor import NoiseFloor, measure_floor, shared_part

CHUNK_TOKENS = 32
_PIECE_TOKENS = 512  # run at once
_LOGIT_TOKENS = 64  # whose logits are held at once
_TOP_TOKENS = 20
_LEAST_LOGIT_FLOOR = 0.3  # of its median, as the least divisor
_UPPER = 0.9
# Trained models reach 1e5. Far from overflow even when squared, divided and summed up.
_ABSURD = 1e8
_PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Reference:
    """A span to hold others' outputs against. Belongs to one thread at a time.

    Attributes:
        exact: Runs it in float32.
        rounded: Run it in `numerics`, with fused kernels and stepwise; they share weights and cache.
        max_tokens: How long a session may be.
    """

    exact: SpanRunner
    rounded: Sequence[SpanRunner]
    max_tokens: int

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

    With bfloat16 it takes six bytes a weight, and as many for each key and value of `max_tokens`.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ConfigError: Nothing here computes in `numerics`.
        SpanOutOfRange: The model has no such blocks.
    """
    exact, rounded = (
        _open(checkpoint, span, each, max_tokens, device, progress) for each in (FLOAT32, numerics)
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


def check_rows(rows: Tensor, tokens: int, hidden_size: int, peer_id: str = "") -> Tensor:
    """`rows` as float32, if they can be reckoned with: (tokens, hidden_size), finite, of a sane size.

    Raises:
        WrongOutput: They cannot.
    """
    if rows.shape != (tokens, hidden_size) or not rows.is_floating_point():
        raise WrongOutput(
            f"hidden states of shape {tuple(rows.shape)} where ({tokens}, {hidden_size}) is due", peer_id
        )
    rows = rows.detach().to("cpu", torch.float32)
    largest = float(rows.abs().max()) if tokens else 0.0  # NaN if there is one
    if not largest <= _ABSURD:
        raise WrongOutput(f"hidden states with a value of {largest:g}", peer_id)
    return rows


def measure_span(
    reference: Reference,
    span: BlockSpan,
    inputs: Tensor,
    outputs: Tensor,
    *,
    wire_dtype: torch.dtype,
    positions: Sequence[int] | None = None,
    tail: Tail | None = None,
    is_enough: Callable[[Deviation], bool] = lambda _: False,
    peer_id: str = "",
) -> Deviation:
    """Measure how far a session's outputs lie from the span's.

    The same tensors give the same numbers on the same machine with the same number of threads.

    Args:
        span: What the peer ran; among the reference's blocks.
        inputs: (tokens, hidden_size), all that the span was given from position 0 on, as decoded.
        outputs: (n, hidden_size), what it gave, as decoded.
        wire_dtype: What the wire carried.
        positions: Those of the outputs, ascending; None if they are those of the inputs.
        tail: What follows `span`. If that has blocks, it needs all outputs.
        is_enough: Whether the logits need not be looked at any more, which takes longest.

    Raises:
        ValueError: The inputs cannot be run, or the positions are not theirs.
        WrongOutput: The outputs are misshapen, not finite or absurdly large.
    """
    at = _check_positions(positions, len(inputs))
    outputs = check_rows(outputs, len(at), reference.spec.hidden_size, peer_id)
    floor = rerun(reference, span, inputs, wire_dtype)
    deviation = compare(floor, outputs, at)
    if tail is None or is_enough(deviation):
        return deviation
    return compare(floor, outputs, at, tail)


def rerun(reference: Reference, span: BlockSpan, inputs: Tensor, wire_dtype: torch.dtype) -> NoiseFloor:
    """Run `span` over a session, in float32 and as an honest peer might.

    Raises:
        ValueError: The inputs cannot be run.
    """
    tokens = len(inputs)
    if not 1 <= tokens <= reference.max_tokens:
        raise ValueError(f"{tokens} tokens cannot be run again; 1 to {reference.max_tokens} can")
    try:
        inputs = check_rows(inputs, tokens, reference.spec.hidden_size)
    except WrongOutput as exc:
        raise ValueError(f"the inputs cannot be: {exc}") from exc
    with torch.inference_mode():
        exact = run_session(reference.exact, inputs, span)
        rounded = [run_session(runner, inputs, span).to(wire_dtype).float() for runner in reference.rounded]
        if not all(each.isfinite().all() for each in (exact, *rounded)):
            raise ValueError("the inputs make the span itself overflow")
        return measure_floor(inputs, exact, rounded)


def compare(
    floor: NoiseFloor, outputs: Tensor, positions: Sequence[int], tail: Tail | None = None
) -> Deviation:
    """Deviation of checked outputs from a session that was run again; see `measure_span`."""
    at = list(positions)
    where = torch.tensor(at, dtype=torch.long)
    with torch.inference_mode():
        deviations = floor.deviations(outputs, where)
        effect = _measure_logits(tail, floor, outputs, where) if tail and at else None
    first = float(deviations[0].square().sum().sqrt()) if at and at[0] == 0 else None
    chunks = tuple(
        _describe(at[part], deviations[part], floor.alike(where[part]), effect.part(part) if effect else None)
        for part in _chunks(0 if first is None else 1, len(at))
    )
    return Deviation(chunks, first)


def run_session(runner: SpanRunner, hidden: Tensor, span: BlockSpan | None = None) -> Tensor:
    """(tokens, hidden_size) in, the same out in float32, in a session of its own.

    The end is filled up as products fill up theirs, which changes nothing before it: oneDNN makes kernels
    for every number of rows that it has not seen, those of stepwise attention too, and 40 tokens through 3
    blocks took 25 ms with that, 15 without.
    """
    tokens = len(hidden)
    hidden = torch.cat([hidden, hidden[-1:].expand(padded_rows(tokens) - tokens, -1)])
    lease = runner.cache.reserve(len(hidden))
    try:
        outputs: list[Tensor] = []
        for piece in torch.split(hidden, _PIECE_TOKENS):
            outputs += [each.float() for each in runner.run([Chunk(lease, lease.length, piece)], span)]
        return torch.cat(outputs)[:tokens]
    finally:
        lease.release()


def run_sessions(
    runner: SpanRunner, sessions: Sequence[Tensor], span: BlockSpan | None = None
) -> list[Tensor]:
    """`run_session` of several of one length; as one batch, which is quicker, where the cache has room."""
    tokens, count, page = len(sessions[0]), len(sessions), runner.cache.page_tokens
    if tokens * count > _PIECE_TOKENS or -(-tokens // page) * page * count > runner.cache.free_tokens:
        return [run_session(runner, each, span) for each in sessions]
    leases = [runner.cache.reserve(tokens) for _ in sessions]
    try:
        chunks = [Chunk(lease, 0, each) for lease, each in zip(leases, sessions, strict=True)]
        return [each.float() for each in runner.run(chunks, span)]
    finally:
        for lease in leases:
            lease.release()


@dataclass(frozen=True, slots=True)
class _LogitEffect:
    """Effects on the logits by token, each (n,)."""

    rho: Tensor
    flip_margin: Tensor

    def part(self, part: slice) -> LogitDeviation:
        rho = self.rho[part]
        return LogitDeviation(float(rho.median()), float(rho.max()), float(self.flip_margin[part].max()))


def _check_positions(positions: Sequence[int] | None, tokens: int) -> list[int]:
    at = list(range(tokens)) if positions is None else list(positions)
    if at != sorted(set(at)) or (at and not 0 <= at[0] <= at[-1] < tokens):
        raise ValueError(f"outputs for positions that the {tokens} inputs have not")
    return at


def _measure_logits(tail: Tail, floor: NoiseFloor, outputs: Tensor, positions: Tensor) -> _LogitEffect | None:
    """Effect of `outputs` on the logits; None where the blocks of the tail lack some of their inputs."""
    runs = [floor.exact, *floor.rounded]
    if tail.runner is None:
        runs = [*(run[positions] for run in runs), outputs]
    elif len(outputs) < len(floor.exact):
        return None
    else:
        runs = run_sessions(tail.runner, [*runs, outputs], tail.span)
    changes, floors, margins = zip(*_compare_logits(tail.embedding_and_head, runs), strict=True)
    change, least = torch.cat(changes), torch.cat(floors)
    least = least.clamp_min(max(_LEAST_LOGIT_FLOOR * float(least.median()), torch.finfo(torch.float32).tiny))
    return _LogitEffect(change / least, torch.cat(margins))


def _compare_logits(
    embedding_and_head: EmbeddingAndHead, runs: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Piece by piece: the change of the likeliest tokens' logits, that by rounding, the margins of flips.

    `runs` are the exact one, the rounded ones, and the outputs.
    """
    for start in range(0, len(runs[0]), _LOGIT_TOKENS):
        rows = [run[start : start + _LOGIT_TOKENS] for run in runs]
        right, *near, got = torch.split(embedding_and_head.logits(torch.cat(rows)), len(rows[0]))
        count = min(_TOP_TOKENS, right.shape[-1])
        # Whatever either side thinks likely: a token may be pushed up from anywhere.
        top = torch.cat([right.topk(count).indices, got.topk(count).indices], -1)
        reference = right.gather(-1, top)
        change, *rounding = ((each.gather(-1, top) - reference).abs().amax(-1) for each in (got, *near))
        best = right.softmax(-1).topk(2)
        flipped = got.argmax(-1) != best.indices[:, 0]
        usual = torch.stack(rounding).square().mean(0).sqrt()
        yield change, usual, (best.values[:, 0] - best.values[:, 1]) * flipped


def _chunks(start: int, stop: int) -> list[slice]:
    """`start:stop` in parts of about `CHUNK_TOKENS`, as even as can be."""
    count = stop - start
    if count < 1:
        return []
    parts = max(1, round(count / CHUNK_TOKENS))
    bounds = [start + count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _describe(
    positions: Sequence[int], deviations: Tensor, alike: float, logits: LogitDeviation | None
) -> ChunkDeviation:
    rho = deviations.square().sum(-1).sqrt()
    return ChunkDeviation(
        positions[0],
        positions[-1] + 1,
        len(rho),
        float(rho.quantile(0.5)),
        float(rho.quantile(_UPPER)),
        float(rho.max()),
        shared_part(deviations),
        logits,
        alike,
    )


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
        dtype=str(numerics),
        cache_bytes=pages * _PAGE_TOKENS * per_token,
        page_tokens=_PAGE_TOKENS,
    )
    return open_runner(checkpoint, span, config, progress=progress)
