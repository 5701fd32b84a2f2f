"""Session on one hop: steps come in, are computed in order, and go on to the successor.

    predecessor ──Step──> accept ──StepWork──> worker ──> outbox ──Step/Result──> successor or client

`read` takes steps in, from the client's stream and from a predecessor's alike, and never waits for anything
but the next one. The worker's results land in the outbox, and one task sends. So reading, computing and
sending of successive steps overlap, and a chunked prompt keeps every hop of a route at work.

What a session is made of has one job each: `Inbox` says which steps are taken in and which are still wanted,
`StepWork` (`forward`) is a step on its way through the worker, `Outbox` sends its result, `Neighbours` holds
the streams, and `Lifetime` ends it all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

import trio

from p2pinfer.errors import CacheFull, ProtocolViolation
from p2pinfer.models.numerics import row_bytes
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.concurrency.loop_share import Meter, Overspent, clocked
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence.prefixes import Prefix
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.protocol.draws import decode_ids
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import End, Message, Open, Step
from p2pinfer.node.protocol.tensors import view_hidden, view_ids, view_packed

from .forward import ServedSpan, StepContext, StepWork
from .inbox import Inbox
from .lifetime import Lifetime, SessionRefusal
from .neighbours import Neighbours
from .outbox import Outbox
from .quota import CacheRoom, ReplayRoom
from .receipt_signer import ReceiptSigner


class HopSession:
    """One session on this hop, from its admission to its end.

    `opening` is what the client asked for; `room` and `replay` are its reservations, which `close` gives
    back. Outputs go to the successor; on the last hop they return to the client on `control`. A session may
    begin with a `prefix`, whose pages `room` shares.

    Attributes:
        prompt_at: When a prompt began whose end has not come, by trio's clock; else None. A session begins
            with one that is still on its way here.
    """

    def __init__(
        self,
        opening: Open,
        client_id: str,
        control: FrameStream,
        *,
        served: ServedSpan,
        room: CacheRoom,
        replay: ReplayRoom | None,
        config: ServeConfig,
        signer: ReceiptSigner,
        evidence: EvidenceStore,
        prefix: Prefix | None = None,
    ) -> None:
        self.opening = opening
        self.client_id = client_id
        self.lifetime = Lifetime()
        self.prompt_at: float | None = trio.current_time()
        self.inbox = Inbox(opening.max_tokens, config, opening.packed)
        self.neighbours = Neighbours(opening, client_id, control)
        self.outbox = Outbox(
            opening,
            self.neighbours,
            self.inbox,
            self.lifetime,
            signer=signer,
            evidence=evidence,
            replay=None if replay is None else replay.log,
            max_steps=config.max_steps_in_flight,
        )
        self._spec = served.spec
        self._hidden_size = served.spec.hidden_size
        self.room = room
        self.replay_room = replay
        self._worker = served.worker
        span = BlockSpan(opening.start, opening.stop)
        self._context = StepContext(
            served.runner,
            None if span == served.runner.span else span,
            room.lease,
            client_id,
            opening.codec,
            self._hidden_size,
            opening.packed,
            opening.successor is None,
            self.inbox,
            self.lifetime,
            self.outbox.sender,
            served.speed,
            served.adapters.find(client_id, opening.revision, span),
            served.embedder(opening),
            served.drawer(opening),
        )
        self._is_closed = False
        self._prefix = prefix
        self._begins_with = room.lease.length
        self._has_begun = False  # to compute
        self._is_kept = False  # by the client's wish

    @property
    def is_keepable(self) -> bool:
        """True if another session of the client may begin as this one, which has ended as it should."""
        return (
            self._is_kept
            and self.lifetime.ended_by is None
            and not self.inbox.in_flight
            and self._context.adapter is None
        )

    async def read(
        self,
        stream: FrameStream,
        answer: Callable[[Message], Coroutine[Any, Any, None]],
        *,
        has_steps: bool,
    ) -> None:
        """Take in what comes on a stream until its `End`: steps, if it has any, and the rest by `answer`.

        Raises:
            PeerVanished: The stream broke.
            ProtocolViolation: A step does not follow from the ones before, or is larger than agreed.
        """
        meter = stream.meter
        is_metered = False
        while True:
            # Steps are bounded by what is in flight, and pay for nothing. Whatever else is said costs the
            # peer its part of the event loop, from the second such message in a row also for being read.
            if is_metered and meter is not None:
                message, payload = await clocked(stream.receive(), meter.spend)
            else:
                message, payload = await stream.receive()
            is_metered = False
            match message:
                case Step() if has_steps:
                    self.accept(message, payload, stream)
                    if meter is not None:
                        meter.steps += 1
                        meter.step_bytes += len(payload)
                case End():
                    self._is_kept = message.keep and stream is self.neighbours.control
                    return
                case _ if meter is not None:
                    is_metered = True
                    await clocked(answer(message), meter.spend)
                    await _pause(meter, stream.peer_id)
                case _:
                    await answer(message)

    def accept(self, step: Step, payload: bytearray, feeder: FrameStream) -> None:
        """Check a step that came on the stream `feeder` and hand it to the worker.

        Raises:
            ProtocolViolation: The step does not follow from the ones before, or is larger than agreed.
            SessionRefusal: Others have filled the room that it would need.
        """
        arrived_at = time.perf_counter()
        neighbours = self.neighbours
        if (feeder is not neighbours.feeder or step.replay) and not neighbours.takes_from(
            feeder, is_replay=step.replay > 0
        ):
            return
        if step.kept:
            self._take_kept(step, payload, feeder, arrived_at)
            return
        takes_ids, is_packed = self.opening.tokens, step.position < self.opening.packed
        room_bytes = step.tokens * self._row_bytes if takes_ids or is_packed else len(payload)
        self.inbox.take(step, room_bytes, feeder.peer_id)
        if not self._has_begun or step.position < self.room.lease.own_from:
            self._begin(step.position)
        room, stop = self.room, step.position + step.tokens
        if stop > room.filled:
            if stop > room.lease.max_tokens:  # others have taken back what was not used
                try:
                    room.grow(stop)
                except CacheFull as exc:
                    raise SessionRefusal("cache_full", str(exc)) from exc
            room.filled = stop
        peer, codec = feeder.peer_id, self.opening.codec
        if takes_ids:
            hidden = view_ids(decode_ids(payload, step.tokens, self._spec.vocab_size, peer))
        elif is_packed:
            hidden = view_packed(payload, step.tokens, self._hidden_size, peer)
        else:
            hidden = view_hidden(payload, step.tokens, self._hidden_size, codec, peer)
        self.lifetime.last_active = now = trio.current_time()
        if step.returns or step.replay:  # a token, the end of a prompt, or what is replayed of the past
            self.prompt_at = None
        elif self.prompt_at is None:
            self.prompt_at = now
        self._worker.submit(StepWork(self._context, step, hidden, payload, feeder, arrived_at, room_bytes))

    def _take_kept(self, step: Step, payload: bytearray, feeder: FrameStream, arrived_at: float) -> None:
        """Sign for a piece of the prefix, which the step only names, and pass it on."""
        prefix, peer = self._prefix, feeder.peer_id
        if prefix is None or self._has_begun or step.position + step.tokens > self._begins_with:
            raise ProtocolViolation(f"step {step.number} names a prefix that this session has not", peer)
        if payload or step.replay or step.returns:  # a receipt for rows that nobody has would be a lie
            raise ProtocolViolation(f"step {step.number} brings what it says is here", peer)
        received, sent = prefix.piece(step.position, step.tokens)
        self.inbox.take(step, len(received), peer)
        hidden = view_hidden(received, step.tokens, self._hidden_size, self.opening.codec, peer)
        work = StepWork(self._context, step, hidden, received, feeder, arrived_at)
        work.output, work.sent = hidden, sent
        self.lifetime.last_active = trio.current_time()
        self.outbox.sender.send_nowait(work)  # never full: the inbox bounds what is in flight

    def _begin(self, position: int) -> None:
        """Let the session compute from `position` on, in pages that are its own."""
        if position < self.room.lease.own_from:
            # What is shared is never written. Pages may be exchanged only while nothing of ours reads them.
            if self._has_begun:
                raise SessionRefusal(
                    "cache_full", f"position {position} is in pages that others read as well"
                )
            try:
                self.room.lease.begin_at(position)
            except CacheFull as exc:
                raise SessionRefusal("cache_full", str(exc)) from exc
        self._has_begun, self._prefix = True, None

    @property
    def _row_bytes(self) -> int:
        return row_bytes(self._hidden_size, self.opening.codec)

    def close(self) -> None:
        """Give back every reservation. Steps still queued are dropped unread; harmless twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self.lifetime.end(None)
        self.outbox.close()
        self._worker.release(self.room.lease)


async def _pause(meter: Meter, peer_id: str) -> None:
    try:
        await meter.pause()
    except Overspent as exc:
        raise ProtocolViolation(str(exc), peer_id) from exc
