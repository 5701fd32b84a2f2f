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
from collections.abc import Awaitable, Callable

import trio

from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import End, Message, Open, Step
from p2pinfer.node.protocol.replay_log import ReplayLog
from p2pinfer.node.protocol.tensors import view_hidden

from .forward import ServedSpan, StepContext, StepWork
from .inbox import Inbox
from .lifetime import Lifetime
from .neighbours import Neighbours
from .outbox import Outbox
from .receipt_signer import ReceiptSigner


class HopSession:
    """One session on this hop, from its admission to its end.

    `opening` is what the client asked for; `lease` and `replay` are its reservations, which `close` gives
    back. Outputs go to the successor; on the last hop they return to the client on `control`.
    """

    def __init__(
        self,
        opening: Open,
        client_id: str,
        control: FrameStream,
        *,
        served: ServedSpan,
        lease: CacheLease,
        replay: ReplayLog | None,
        config: ServeConfig,
        signer: ReceiptSigner,
        evidence: EvidenceStore,
    ) -> None:
        self.opening = opening
        self.client_id = client_id
        self.lifetime = Lifetime()
        self.inbox = Inbox(opening.max_tokens, config)
        self.neighbours = Neighbours(opening, client_id, control)
        self.outbox = Outbox(
            opening,
            self.neighbours,
            self.inbox,
            self.lifetime,
            signer=signer,
            evidence=evidence,
            replay=replay,
            max_steps=config.max_steps_in_flight,
        )
        self._hidden_size = served.spec.hidden_size
        self._lease = lease
        self._worker = served.worker
        span = BlockSpan(opening.start, opening.stop)
        self._context = StepContext(
            served.runner,
            None if span == served.runner.span else span,
            lease,
            client_id,
            opening.codec,
            opening.successor is None,
            self.inbox,
            self.lifetime,
            self.outbox.sender,
            served.speed,
        )
        self._is_closed = False

    async def read(
        self, stream: FrameStream, answer: Callable[[Message], Awaitable[None]], *, has_steps: bool
    ) -> None:
        """Take in what comes on a stream until its `End`: steps, if it has any, and the rest by `answer`.

        Raises:
            PeerVanished: The stream broke.
            ProtocolViolation: A step does not follow from the ones before, or is larger than agreed.
        """
        while True:
            message, payload = await stream.receive()
            match message:
                case Step() if has_steps:
                    self.accept(message, payload, stream)
                case End():
                    return
                case _:
                    await answer(message)

    def accept(self, step: Step, payload: bytearray, feeder: FrameStream) -> None:
        """Check a step that came on the stream `feeder` and hand it to the worker.

        Raises:
            ProtocolViolation: The step does not follow from the ones before, or is larger than agreed.
        """
        arrived_at = time.perf_counter()
        neighbours = self.neighbours
        if (feeder is not neighbours.feeder or step.replay) and not neighbours.takes_from(
            feeder, is_replay=step.replay > 0
        ):
            return
        self.inbox.take(step, len(payload), feeder.peer_id)
        hidden = view_hidden(payload, step.tokens, self._hidden_size, self.opening.codec, feeder.peer_id)
        self.lifetime.last_active = trio.current_time()
        self._worker.submit(StepWork(self._context, step, hidden, payload, feeder, arrived_at))

    @property
    def reserved_tokens(self) -> int:
        """Tokens of the cache that are kept for this session."""
        return self._lease.max_tokens

    @property
    def reserved_replay_bytes(self) -> int:
        """Bytes of the replay log that are kept for this session."""
        return self.outbox.replay.reserved_bytes if self.outbox.replay is not None else 0

    def close(self) -> None:
        """Give back every reservation. Steps still queued are dropped unread; harmless twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self.lifetime.end(None)
        self.outbox.close()
        self._worker.release(self._lease)
