"""Forward passes as work for the batcher: adjacent tokens of a session, through a span of blocks.

    HopSession.accept ──StepWork──> Worker ──run, finish: its thread──> deliver: event loop ──> the outbox

Passes over the same blocks of one runner share a batch, whoever wants them. What is done to a step before and
after, in the worker's thread because it may take its time, is the step's own: its values are checked, since
what is not finite must not reach the cache, and its output is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio
from torch import Tensor

from p2pinfer.errors import ConfigError, WrongOutput
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.compute.runner import Chunk, SpanRunner
from p2pinfer.models.learning.brought import MARK, AdapterShelf, BroughtAdapter
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.ends.held_ends import Drawer
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import MAX_COUNT, Open, Step
from p2pinfer.node.protocol.tensors import (
    check_finite,
    encode_hidden,
    round_hidden,
    unpack_hidden,
    view_hidden,
)

from .decode_speed import DecodeSpeed
from .inbox import Inbox
from .lifetime import Lifetime, SessionRefusal
from .worker import BatchReport, Worker

DECODE_TOKENS: Final = 16  # a pass of at most this many tokens is a step, and no piece of a prompt


class Runner(Protocol):
    """Part of a `SpanRunner` that a pass needs."""

    def run(self, chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """Blocks that this node computes, the thread that does it, and the speed that it keeps.

    `ends` are embedding and head for clients that hold none; None if this node has none either.
    """

    spec: ModelSpec
    runner: SpanRunner
    worker: Worker
    speed: DecodeSpeed
    # That clients have brought, or this node offers.
    adapters: AdapterShelf = field(default_factory=AdapterShelf)
    ends: EmbeddingAndHead | None = None

    def check_terms(self, opening: Open, client: str, adapter_bytes: int) -> None:
        """Nothing, if these blocks can be run for a session as it asks.

        Raises:
            SessionRefusal: It asks for another model, for other blocks, or for an adapter that is not here.
        """
        revision, mark, _ = opening.revision.partition(MARK)
        if revision != self.spec.revision:
            raise SessionRefusal("wrong_model", f"this node serves {self.spec.model} ({self.spec.revision})")
        held = self.runner.span
        if not held.start <= opening.start < opening.stop <= held.stop:
            raise SessionRefusal("wrong_span", f"this node holds blocks {held}")
        if (opening.tokens or opening.draw) and self.ends is None:
            raise SessionRefusal("wrong_span", "this node holds neither embedding nor head")
        is_first = opening.start == 0 and opening.predecessor is None
        is_last = opening.stop == self.spec.num_blocks and opening.successor is None
        if (opening.tokens and not is_first) or (opening.draw and not is_last):
            raise SessionRefusal("protocol", f"blocks {opening.start}:{opening.stop} are not at that end")
        is_own = self.adapters.is_offered(opening.revision)
        if mark and not is_own and self.adapters.held_bytes > adapter_bytes:
            raise SessionRefusal("busy", f"adapters of sessions take {adapter_bytes} bytes, the limit")
        try:
            self.adapters.find(client, opening.revision, BlockSpan(opening.start, opening.stop))
        except KeyError:
            raise SessionRefusal(
                "wrong_model", "the adapter of this session was not brought to this node"
            ) from None

    def chunk_cost(self, opening: Open) -> tuple[int, int]:
        """Microseconds of a chunk of any length through a session's blocks, and nanoseconds of each token."""
        share = (opening.stop - opening.start) / len(self.runner.span)
        fixed_s, token_s = self.speed.chunk_cost
        return min(int(share * fixed_s * 1e6), MAX_COUNT), min(int(share * token_s * 1e9), MAX_COUNT)

    def embedder(self, opening: Open) -> EmbeddingAndHead | None:
        """Embedding for the token ids of a session; None if it brings hidden states."""
        return self.ends if opening.tokens else None

    def drawer(self, opening: Open) -> Drawer | None:
        """Drawer of a session's tokens; None if it wants hidden states.

        Raises:
            SessionRefusal: Its terms make no sense, or need what is not seen here.
        """
        if opening.draw is None or self.ends is None:
            return None
        try:
            return Drawer(self.ends, opening.draw)
        except ConfigError as exc:
            raise SessionRefusal("protocol", str(exc)) from None


class ForwardPass:
    """Adjacent tokens of one session to be run; a base of what knows where its output goes.

    Attributes:
        output: (tokens, hidden_size) once it was run; None before, and if it was dropped or failed.
        error: What went wrong.
    """

    __slots__ = (
        "batch_key",
        "chunk",
        "client",
        "error",
        "is_decode",
        "output",
        "runner",
        "session",
        "span",
        "submitted_at",
        "tokens",
    )

    def __init__(
        self, runner: Runner, span: BlockSpan | None, chunk: Chunk, client: str, submitted_at: float
    ) -> None:
        """A pass through `span`, None for all blocks of the runner, at a time of the worker's clock."""
        self.runner = runner
        self.span = span
        self.chunk = chunk
        self.client = client
        self.submitted_at = submitted_at
        self.session: CacheLease = chunk.lease
        self.tokens: int = chunk.hidden.shape[0]
        self.is_decode = self.tokens <= DECODE_TOKENS
        self.batch_key = (runner, span)
        self.output: Tensor | None = None
        self.error: Exception | None = None

    def run(self, batch: Sequence[ForwardPass]) -> Sequence[ForwardPass]:
        """Run those of a batch that are wanted; returns them."""
        wanted: list[ForwardPass] = []
        chunks: list[Chunk] = []
        for each in batch:
            if each.is_wanted():
                wanted.append(each)
                chunks.append(each.chunk)
        if wanted:
            for each, output in zip(wanted, self.runner.run(chunks, self.span), strict=True):
                each.output = output
        return wanted

    def is_wanted(self) -> bool:
        """True if it is to be computed; asked in the worker's thread, just before it would be."""
        return True

    def finish(self) -> None:
        """Prepare the output, in the worker's thread."""

    def fail(self, error: Exception) -> None:
        """Take note of what went wrong."""
        self.output = None
        self.error = error

    def deliver(self, report: BatchReport) -> None:
        """Hand the output over, in the event loop."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class StepContext:
    """Properties that all steps of one session share on this hop."""

    runner: Runner
    span: BlockSpan | None  # None: all blocks of the runner
    lease: CacheLease
    client: str
    codec: Codec
    hidden_size: int
    packed: int  # positions below it come packed, unless as ids, and go out packed
    is_last: bool  # only what the client wants back is encoded
    inbox: Inbox
    lifetime: Lifetime
    outbox: trio.MemorySendChannel[StepWork]
    speed: DecodeSpeed
    adapter: BroughtAdapter | None = None
    embedder: EmbeddingAndHead | None = None  # of token ids, which come instead of hidden states
    drawer: Drawer | None = None  # of tokens, which the client gets instead of hidden states


class StepWork(ForwardPass):
    """A step of a session, from its arrival to the outbox.

    Attributes:
        received: Its hidden states as they came; of token ids what they were embedded to.
        room_bytes: Bytes that it counts for among those in flight.
        feeder: The stream that they came on.
        sent: Of its output, what goes out, as it is signed for; empty until it is encoded.
        wire: The same as it travels, where that is packed.
        drawn: Tokens that the client gets instead.
        report: What became of its batch, once it is delivered.
    """

    __slots__ = ("_context", "drawn", "feeder", "received", "report", "room_bytes", "sent", "step", "wire")

    def __init__(
        self,
        context: StepContext,
        step: Step,
        hidden: Tensor,
        received: bytearray | bytes,
        feeder: FrameStream,
        arrived_at: float,
        room_bytes: int | None = None,
    ) -> None:
        chunk = Chunk(context.lease, step.position, hidden, context.adapter)
        super().__init__(context.runner, context.span, chunk, context.client, arrived_at)
        self._context = context
        self.step = step
        self.received = received
        self.room_bytes = len(received) if room_bytes is None else room_bytes
        self.feeder = feeder
        self.sent = b""
        self.wire = b""
        self.drawn = b""
        self.report = BatchReport(arrived_at, 0.0, 0.0, 0)

    def is_wanted(self) -> bool:
        """True if the session goes on, no later step has superseded this one, and its values are finite."""
        context = self._context
        if context.lifetime.is_over or context.inbox.is_superseded(self.step):
            return False
        if context.embedder is not None:
            # Not in the event loop: a thousand rows take milliseconds.
            token_ids: list[int] = self.chunk.hidden.tolist()
            rows = context.embedder.embed(token_ids)
            self.chunk = self.chunk._replace(hidden=rows)
            self.received = encode_hidden(rows, context.codec)
            return True
        if self.step.position < context.packed:
            rows, self.received = unpack_hidden(self.chunk.hidden, context.hidden_size, context.codec)
            self.chunk = self.chunk._replace(hidden=rows)
        try:
            check_finite(self.received, context.codec, self.feeder.peer_id)
        except WrongOutput as exc:
            context.inbox.saw_nonfinite = True  # before any step behind this one is asked
            self.error = exc
            return False
        return True

    def finish(self) -> None:
        """Encode what goes out."""
        if (rows := self.output) is not None:
            context, step = self._context, self.step
            if context.is_last:
                rows = rows[self.tokens - step.returns :]
            elif step.position < context.packed:
                self.sent, self.wire = round_hidden(rows, context.codec)
                return
            self.sent = encode_hidden(rows, context.codec)
            if context.drawer is not None and step.returns:
                # From what is signed for, rounded as it would travel: that is what an audit draws from.
                sent = view_hidden(bytearray(self.sent), step.returns, rows.shape[1], context.codec)
                self.drawn = context.drawer.draw(sent, step.position + step.tokens - step.returns)

    def deliver(self, report: BatchReport) -> None:
        """Put the step into the outbox, dropped or not; what failed ends the session."""
        context, error = self._context, self.error
        if context.lifetime.is_over:
            return
        if isinstance(error, WrongOutput):
            context.lifetime.end(SessionRefusal("wrong_input", str(error), error.peer_id))
        elif error is not None:
            context.lifetime.end(SessionRefusal("compute", f"step {self.step.number} failed: {error}"))
        else:
            self.report = report
            if report.tokens == self.tokens and self.output is not None and self.span is None:
                # It had the device to itself.
                if self.tokens == 1:
                    context.speed.steps.append((trio.current_time(), report.ran_s))
                elif not self.is_decode:
                    context.speed.chunks.append((self.tokens, report.compute_s))
            context.outbox.send_nowait(self)  # never full: the inbox bounds what is in flight
