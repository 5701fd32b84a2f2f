"""Server of a node's span: which sessions are let in, who may feed them, and how they end.

A client opens one session stream to every hop of its route, all at once. Each hop reserves cache, dials its
successor with a chain stream, and says `Opened` when that successor has let it attach; so when all hops have
answered the whole chain stands, after one round trip and one dial. A session lives as long as its session
stream. It ends when the client says so or is gone, when its lease runs out, or when a peer breaks protocol;
whatever ends it touches no other session.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Final, TypeVar

import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.models.numerics import row_bytes
from p2pinfer.node.concurrency.loop_share import clocked
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.events import Event, SessionClosed, SessionOpened, SessionRefused
from p2pinfer.node.evidence.prefixes import Prefixes
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.former_sessions import serve_former_clients
from p2pinfer.node.protocol.frames import FrameStream, MinimumRate
from p2pinfer.node.protocol.messages import (
    CHAIN_PROTOCOL,
    FORMER_SESSION_PROTOCOL,
    SESSION_PROTOCOL,
    Alive,
    Attach,
    Attached,
    Message,
    Move,
    Open,
    Opened,
    Probe,
    Refused,
    SessionId,
    printable,
)
from p2pinfer.node.transport.peer_stream import PeerStream

from .forward import ServedSpan
from .hop_session import HopSession
from .lifetime import SessionRefusal, first_enough, unlisted_client
from .quota import Reservations, exceeds_share
from .receipt_signer import ReceiptSigner
from .session_control import FindAddrs, SessionControl

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_FAREWELL_S: Final = 1.0  # for a last word to a peer that may not listen
_FREED_S: Final = 0.25  # for a client's former sessions to be out, before it is told that there is no room
PRESSED_IDLE_S: Final = 30.0  # without a step, after which a session makes room for others that find none


class SpanServer:
    """Serves one span to any number of sessions. Call `register` once the span is loaded."""

    def __init__(
        self,
        host: Network,
        served: ServedSpan,
        config: ServeConfig,
        report: Callable[[Event], None],
        on_change: Callable[[], None] = lambda: None,
        *,
        evidence: EvidenceStore,
        find_addrs: FindAddrs | None = None,
    ) -> None:
        """Set up; nobody is answered before `register`.

        Args:
            find_addrs: Gives the addresses at which a successor is dialled that is not connected, by its id
                and the id of the client that names it; None: there are none.
        """
        self._host = host
        self._served = served
        self._config = config
        self._report = report
        self._find_addrs = find_addrs or _know_nobody
        self._on_change = on_change
        row = partial(row_bytes, served.spec.hidden_size)
        self._reservations = Reservations(served.runner.cache, config, row)
        self._evidence = evidence  # it outlives a span: who moved still answers for what it did
        self._prefixes = Prefixes(
            served.runner.cache,
            lambda digest: evidence.get(digest, trio.current_time()),
            config.prefix_keep_s,
        )
        self._sessions: dict[SessionId, HopSession] = {}
        self._changed = trio.Event()  # set, and replaced, whenever a session begins, ends or expects another
        self._leaving = False
        self._minimum_rate = MinimumRate(config.frame_timeout_s, config.min_bytes_per_s)

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions)

    @property
    def free_tokens(self) -> int:
        """Tokens of the cache that sessions to come may have: those that no session holds, or has earned."""
        return self._reservations.free_tokens

    @property
    def replay_bytes(self) -> int:
        """Bytes that sessions have reserved for replay logs."""
        return self._reservations.replay_bytes

    def register(self) -> None:
        """Answer both protocols from now on."""
        # What they say beside their steps is metered where it is read.
        serve_former_clients(self._host)
        self._host.serve(SESSION_PROTOCOL, self._answer_client, is_metered=False)
        self._host.serve(CHAIN_PROTOCOL, self._answer_predecessor, is_metered=False)

    def unregister(self) -> None:
        """Answer no more streams; those that are open stay."""
        self._host.stop_serving(FORMER_SESSION_PROTOCOL)
        self._host.stop_serving(SESSION_PROTOCOL)
        self._host.stop_serving(CHAIN_PROTOCOL)

    def refuse_newcomers(self) -> None:
        """Let nobody in any more; sessions that run go on."""
        self._leaving = True

    async def drain(self, within_s: float) -> None:
        """Have the clients of all sessions go on elsewhere; returns when they have, or the time is over."""
        self.refuse_newcomers()
        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                for session in self._sessions.values():
                    nursery.start_soon(session.neighbours.say_leaving, within_s)
            while self._sessions:
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ------------------------------------------------------------------ the client's stream

    async def _answer_client(self, stream: PeerStream) -> None:
        control = self._frames(stream)
        async with aclosing(stream):
            opening = await _metered(control, self._first_message(control))
            if isinstance(opening, Move):
                await self._move_client(opening, control)
                return
            if not isinstance(opening, Open):
                raise ProtocolViolation(
                    f"a session stream begins with {type(opening).__name__}", stream.peer_id
                )
            if why := self._host.gate.refuses(stream.peer_id, "clients"):  # which counts it
                await self._refuse(control, unlisted_client(stream.peer_id, why))
                return
            try:
                session = await _metered(control, self._admit_when_freed(opening, stream, control))
            except SessionRefusal as refusal:
                self._host.counts.add("refusals", refusal.code)
                await self._refuse(control, refusal)
                return
            control.max_payload_bytes = self._largest_payload
            await self._run(session)

    async def _move_client(self, move: Move, control: FrameStream) -> None:
        """Let a client go on with its session on this stream, a direct one most likely."""
        session = self._sessions.get(move.session)
        if session is None or session.client_id != control.peer_id:
            await self._turn_away(control, Refused("no_session", "this client has no such session here"))
            return
        control.max_payload_bytes = self._largest_payload
        await session.neighbours.go_on_at(control)

    async def _refuse(self, control: FrameStream, refusal: SessionRefusal) -> None:
        """Tell the operator and the client that it gets no session."""
        self._report(SessionRefused(control.peer_id, refusal.code, str(refusal)))
        said = Refused(refusal.code, printable(str(refusal)), fits=refusal.fits)
        await self._turn_away(control, said)

    async def _turn_away(self, control: FrameStream, refused: Refused) -> None:
        with trio.move_on_after(_FAREWELL_S):
            await control.send(refused)
            await control.end()

    async def _admit_when_freed(self, opening: Open, stream: PeerStream, control: FrameStream) -> HopSession:
        """Let a client in; if there is no room, once more when sessions that end are out.

        A client whose text needs more room ends its session and opens a larger one at once. Which of the two
        we read first is chance, and pages come back through the worker's thread. Sessions of others end here
        if they rest.
        """
        if opening.prefix is not None:
            with trio.move_on_after(_FREED_S):
                # Its end, on a stream of its own, may be read after this opening.
                while self._is_open(opening.prefix.session, stream.peer_id):
                    await self._changed.wait()
        try:
            return self._admit(opening, stream, control)
        except SessionRefusal as refusal:
            if refusal.code not in ("cache_full", "over_share", "busy"):
                raise
            ended = self._end_idle(refusal, opening.max_tokens)
            if refusal.code == "busy" and not ended:
                raise
        with trio.move_on_after(_FREED_S):
            while any(each in ended or each.client_id == stream.peer_id for each in self._sessions.values()):
                await self._changed.wait()
            await self._served.worker.released()
        return self._admit(opening, stream, control)

    def _admit(self, opening: Open, stream: PeerStream, control: FrameStream) -> HopSession:
        client_id, address_range = stream.peer_id, stream.address_range
        served, config = self._served, self._config
        if self._leaving:
            raise SessionRefusal("leaving", "this node is shutting down")
        served.check_terms(opening, client_id, config.session_adapter_bytes)
        if opening.session in self._sessions:
            raise SessionRefusal("busy", "this session is already open")
        if len(self._sessions) >= config.max_sessions:
            raise SessionRefusal("busy", f"{config.max_sessions} sessions are open, which is the limit")
        if len(self._sessions_of(client_id)) >= config.max_sessions_per_client:
            raise SessionRefusal(
                "busy", f"{config.max_sessions_per_client} sessions of yours are open, the limit"
            )
        of_range = sum(each.room.address_range == address_range for each in self._sessions.values())
        places = config.max_sessions - len(self._sessions)
        if of_range >= config.max_sessions_per_client // 4 and exceeds_share(
            of_range + 1, places - 1, config.client_share
        ):
            raise SessionRefusal("busy", f"{of_range} sessions from your addresses are open, their share")
        prefix = self._prefixes.find(client_id, opening, trio.current_time())
        room, replay = self._reservations.reserve(opening, client_id, address_range, prefix)
        session = HopSession(
            opening,
            client_id,
            control,
            served=served,
            room=room,
            replay=replay,
            config=config,
            signer=ReceiptSigner(opening, served.runner.numerics, self._host.sign),
            evidence=self._evidence,
            prefix=prefix,
        )
        self._sessions[opening.session] = session
        self._reservations.add(room, replay)
        self._notify()
        self._host.counts.add("sessions_opened")
        blocks = (opening.start, opening.stop)
        self._report(SessionOpened(client_id, blocks, opening.max_tokens, self.sessions))
        self._on_change()
        return session

    def _is_open(self, session_id: SessionId, client_id: str) -> bool:
        session = self._sessions.get(session_id)
        return session is not None and session.client_id == client_id

    def _sessions_of(self, client_id: str) -> list[HopSession]:
        return [session for session in self._sessions.values() if session.client_id == client_id]

    def _end_idle(self, refused: SessionRefusal, max_tokens: int) -> list[HopSession]:
        """End sessions that rest while others are refused for them, those that rest longest; returns them.

        None are ended if that would not be enough. A lease is long, so that a reader may pause; here somebody
        waits for what it keeps.
        """
        if refused.code == "busy" and len(self._sessions) < self._config.max_sessions:
            return []  # it is the client's own limit that was reached
        idle = [each for each in self._sessions.values() if each.lifetime.idle_s() > PRESSED_IDLE_S]
        idle.sort(key=lambda each: each.lifetime.last_active)
        missing, of_each = 1, [1] * len(idle)  # places, where it is those that lack
        if refused.code != "busy":
            missing = self._served.runner.cache.whole_pages(max_tokens) - self.free_tokens
            of_each = [each.room.earned for each in idle]
        chosen = first_enough(zip(idle, of_each, strict=True), missing)
        for session in chosen:
            problem = f"no step for {session.lifetime.idle_s():.0f} s, and others need the room"
            session.lifetime.end(SessionRefusal("lease_expired", problem))
        return chosen

    async def _run(self, session: HopSession) -> None:
        """Everything between a session's admission and its end."""
        lifetime, neighbours = session.lifetime, session.neighbours
        try:
            opened = self._opened(session.opening, session.room.lease.length)
            control = SessionControl(
                session, self._host, self._config, opened, self._notify, self._find_addrs
            )
            await control.run()
        finally:
            if session.is_keepable:
                opening, lease, steps = session.opening, session.room.lease, session.outbox.standing
                self._prefixes.keep(session.client_id, opening, lease, steps, trio.current_time())
            self._reservations.discard(session.room, session.replay_room)
            session.close()
            del self._sessions[session.opening.session]
            self._notify()
            refusal = lifetime.ended_by
            reason = "done" if refusal is None else str(refusal)
            if refusal is not None:
                self._host.counts.add("refusals", refusal.code)
            tokens = session.outbox.tokens_computed
            self._report(SessionClosed(session.client_id, tokens, reason, self.sessions))
            self._on_change()
        # The session is over, whether its client listens or not.
        with trio.move_on_after(_FAREWELL_S):
            if refusal is not None:
                with suppress(PeerVanished):
                    await neighbours.refuse(refusal.code, str(refusal), refusal.about_peer)
            await neighbours.control.end()
        neighbours.leave()

    def _opened(self, opening: Open, prefix: int) -> Opened:
        config, served = self._config, self._served
        limits = (config.max_chunk_tokens, config.max_steps_in_flight, config.max_bytes_in_flight)
        return Opened(
            str(served.runner.numerics),
            *limits,
            prefix,
            int(config.prefix_keep_s),
            served.ends is not None,
            0,  # the successor's round trip is told when it has attached
            *served.chunk_cost(opening),
        )

    # ------------------------------------------------------------------ the predecessor's stream

    async def _answer_predecessor(self, stream: PeerStream) -> None:
        chain = self._frames(stream)
        async with aclosing(stream):
            attach = await self._first_message(chain)
            if not isinstance(attach, Attach):
                raise ProtocolViolation(f"a chain stream begins with {type(attach).__name__}", stream.peer_id)
            unwanted = self._host.gate.refuses(stream.peer_id, "nodes")
            session = None if unwanted else await self._await_session(attach.session, stream.peer_id)
            if session is None:
                await chain.send(Refused("no_session", "no session here expects you as its predecessor"))
                await chain.end()
                return
            chain.max_payload_bytes = self._largest_payload
            lifetime, predecessors = session.lifetime, session.neighbours.predecessors
            with lifetime.scope(), predecessors.feeding(stream.peer_id), lifetime.guard():
                await chain.send(Attached())
                await session.read(chain, partial(_answer_on_chain, chain), has_steps=True)
            with trio.CancelScope(shield=True), trio.move_on_after(_FAREWELL_S):
                await chain.end()  # so that it is no broken stream to the predecessor

    async def _await_session(self, session_id: SessionId, peer_id: str) -> HopSession | None:
        """The session of that id that expects the peer; the client's own word may still be on its way."""
        with trio.move_on_after(self._config.handshake_timeout_s):
            while True:
                changed = self._changed
                session = self._sessions.get(session_id)
                if session is not None and session.neighbours.predecessors.expects(peer_id):
                    return session
                await changed.wait()
        return None

    # ------------------------------------------------------------------ both

    @property
    def _largest_payload(self) -> int:
        return self._config.max_chunk_tokens * row_bytes(self._served.spec.hidden_size, "float32")

    def _frames(self, stream: PeerStream) -> FrameStream:
        """Frames without payloads: who has not been let in cannot make us hold megabytes a stream."""
        return FrameStream(
            stream, max_payload_bytes=0, peer_id=stream.peer_id, minimum_rate=self._minimum_rate
        )

    async def _first_message(self, frames: FrameStream) -> Message:
        with trio.move_on_after(self._config.handshake_timeout_s):
            message, _ = await frames.receive()
            return message
        raise ProtocolViolation("opened a stream and said nothing", frames.peer_id)


async def _metered(frames: FrameStream, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work` and count what it takes of the event loop among the peer's messages."""
    return await (work if frames.meter is None else clocked(work, frames.meter.spend))


async def _answer_on_chain(chain: FrameStream, message: Message) -> None:
    """Answer what a predecessor says beside its steps."""
    if not isinstance(message, Probe):
        raise ProtocolViolation(f"{type(message).__name__} on a chain stream", chain.peer_id)
    await chain.send(Alive(message.number))


async def _know_nobody(peer_id: str, client_id: str) -> tuple[str, ...]:
    return ()
