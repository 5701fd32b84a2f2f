"""What the client of a running session says, and what the hop does about it.

The client's stream brings steps, if the client feeds this hop itself, and changes of the chain: who may feed
us (`Expect`), whom we feed (`Relink`), whether everybody is there (`Probe`). Nobody else can change a chain.
Steps are taken in at once; what may take long runs beside the reader, at most one relinking and two
probes at a time.

One change needs no client: a link that began on a relayed connection moves to a direct one when there is one.
Between two steps the successor confirms that it has read everything, the session is attached once more over
the other connection, and what follows goes there: a round trip on each of the two, and nothing is sent twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Final

import trio

from p2pinfer.errors import NotAdmitted, PeerError, PeerRefused, PeerVanished, ProtocolViolation, WrongOutput
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.host.host import Host
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.link import Link
from p2pinfer.node.protocol.messages import (
    CHAIN_PROTOCOL,
    Alive,
    Attach,
    Attached,
    End,
    Expect,
    Opened,
    Probe,
    RefusalCode,
    Relink,
    Relinked,
    Step,
    Successor,
)
from p2pinfer.node.protocol.replay_log import ReplayGap
from p2pinfer.node.transport.peer_stream import PeerStream

from .hop_session import HopSession, SessionRefusal

logger = logging.getLogger(__name__)


@contextmanager
def ending(session: HopSession, client_gone: str | None = None) -> Generator[None]:
    """What a peer does wrong inside ends the session, and nothing else.

    A stream that breaks ends it only if it is the client's, and `client_gone` says so; a predecessor that
    vanishes may be replaced.
    """
    try:
        yield
    except SessionRefusal as refusal:
        session.end(refusal)
    except ProtocolViolation as exc:
        session.end(SessionRefusal("protocol", str(exc), exc.peer_id))
    except WrongOutput as exc:
        session.end(SessionRefusal("wrong_input", str(exc), exc.peer_id))
    except PeerVanished as exc:
        logger.debug("session.stream_lost peer=%s why=%s", exc.peer_id, exc)
        if client_gone:
            session.end(SessionRefusal("no_session", client_gone))


LOOK_S: Final = 0.25  # between looks whether a link can leave its relay
MOVE_S: Final = 5.0  # for the successor's word that it has read everything


class SessionControl:
    """The tasks of one session between its admission and its end; `run` is all of them."""

    def __init__(
        self,
        session: HopSession,
        host: Host,
        config: ServeConfig,
        opened: Opened,
        on_expect: Callable[[], None],
    ) -> None:
        """`on_expect` is called when the session has come to expect another predecessor."""
        self._session = session
        self._host = host
        self._config = config
        self._opened = opened
        self._on_expect = on_expect
        self._relinking = trio.CancelScope()
        self._relinks = 0
        # What is being answered: whether we are there, whether our successor is.
        self._probing: set[bool] = set()
        self._moving = trio.CancelScope()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Until the session ends, by whatever."""
        with self._session.scope():
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._link_and_forward)
                self._nursery.start_soon(self._watch_lease)
                if self._session.opening.successor is not None:
                    self._nursery.start_soon(self._leave_relays)
                with ending(self._session, client_gone="the client vanished"):
                    await self._read()

    async def _read(self) -> None:
        """Until the client says `End`, on whatever stream it goes on."""
        while True:
            with trio.CancelScope() as self._session.reading:
                return await self._read_from(self._session.control)

    async def _read_from(self, control: FrameStream) -> None:
        session = self._session
        while True:
            message, payload = await control.receive()
            match message:
                case Step() if session.opening.predecessor is None:
                    session.accept(message, payload, control)
                case Expect():
                    session.last_active = trio.current_time()
                    session.predecessors.expect(message.predecessor)
                    self._on_expect()
                case Relink() if session.opening.successor is not None:
                    self._begin_relink(message)
                case Probe():
                    asks_successor = message.within_ms > 0
                    if asks_successor not in self._probing:
                        self._probing.add(asks_successor)
                        self._nursery.start_soon(self._answer, message, asks_successor)
                case End():
                    return session.end(None)
                case _:
                    raise ProtocolViolation(f"{type(message).__name__} in the middle of a session")

    async def _watch_lease(self) -> None:
        session, lease_s = self._session, self._config.lease_s
        while (deadline := session.last_active + lease_s) > trio.current_time():
            await trio.sleep_until(deadline)
        session.end(SessionRefusal("lease_expired", f"no step for {lease_s:g} s"))

    # ------------------------------------------------------------------ the successor

    async def _link_and_forward(self) -> None:
        session = self._session
        with ending(session, client_gone="the client vanished"):
            if session.opening.successor is not None:
                session.link = await self._link_to(session.opening.successor)
            try:
                await session.control.send(self._opened)
                await session.forward()
            finally:
                for link in (session.link, session.standby):
                    if link is not None:
                        with trio.CancelScope(shield=True), trio.move_on_after(1):
                            await link.end()

    async def _link_to(self, successor: Successor) -> Link:
        with self._reaching(successor.peer_id):
            if not self._host.gate.admits(successor.peer_id, "nodes"):
                raise NotAdmitted("it is not admitted as a node", successor.peer_id)
            stream = await self._host.open_stream(successor.peer_id, CHAIN_PROTOCOL, successor.addrs)
            return await self._attach(stream)

    async def _attach(self, stream: PeerStream) -> Link:
        """A link over this stream to a successor that has agreed to take our steps."""
        chain = FrameStream(stream, max_payload_bytes=0, peer_id=stream.peer_id)
        try:
            await chain.send(Attach(self._session.opening.session))
            reply, _ = await chain.receive()
            if not isinstance(reply, Attached):
                raise PeerRefused(f"it answered {reply}", stream.peer_id)
        except BaseException:
            await stream.reset()
            raise
        link = Link(chain, self._session.pass_on, is_relayed=stream.is_relayed)
        self._nursery.start_soon(self._watch, link)
        return link

    @contextmanager
    def _reaching(self, peer_id: str) -> Generator[None]:
        """What goes wrong inside, or takes too long, is a successor that cannot be reached."""
        try:
            with trio.fail_after(self._config.dial_timeout_s):
                yield
        except (PeerError, trio.TooSlowError) as exc:
            # What happened at which address is for our own log: a client could scan our network with it.
            logger.debug("session.no_successor peer=%s why=%s", peer_id, exc)
            raise SessionRefusal("successor_unreachable", "could not reach the next hop", peer_id) from exc

    async def _leave_relays(self) -> None:
        """Move the link to a direct connection as soon as there is one."""
        while True:
            await trio.sleep(LOOK_S)
            link = self._session.link
            if link is not None and link.is_relayed and self._host.connection_kind(link.peer_id) == "direct":
                with trio.CancelScope() as self._moving:
                    moved = False
                    with ending(self._session, client_gone="the client vanished"):
                        moved = await self._move(link)
                    if not moved:
                        await trio.sleep(MOVE_S)

    async def _move(self, link: Link) -> bool:
        """Move a link; False if it stays where it is."""
        session = self._session
        try:
            with self._reaching(link.peer_id):
                stream = await self._host.open_stream(link.peer_id, CHAIN_PROTOCOL)
            moved = False
            try:
                moved = await self._move_to(stream, link)
            finally:
                if not moved:
                    await stream.reset()
            if not moved:
                return False
        except SessionRefusal as exc:
            logger.debug("session.not_moved peer=%s why=%s", link.peer_id, exc)
            if session.link is None:  # the successor had let go of the former one already
                await session.refuse("successor_vanished", str(exc), link.peer_id)
            return False
        self._host.counts.add("upgrades")
        await link.aclose()
        return True

    async def _move_to(self, stream: PeerStream, link: Link) -> bool:
        """Nothing is sent on meanwhile: for a round trip on each of the two connections."""
        session = self._session
        async with session.pausing:
            began_at = trio.current_time()
            if session.link is not link or not await link.probe(MOVE_S):
                return False
            with self._reaching(link.peer_id):
                session.move(await self._attach(stream))
            pause_ms = (trio.current_time() - began_at) * 1e3
            logger.debug("session.moved peer=%s pause_ms=%.0f", link.peer_id, pause_ms)
            return True

    async def _watch(self, link: Link) -> None:
        try:
            await link.watch()
        except PeerError as exc:
            logger.debug("session.link_lost peer=%s why=%s", link.peer_id, exc)
            with suppress(PeerVanished):  # the reader of the client's stream notices by itself
                await self._session.lose(link, str(exc))
        finally:
            if self._session.link is link:
                self._session.link = None
            await link.aclose()

    # ------------------------------------------------------------------ what the client asks for

    def _begin_relink(self, relink: Relink) -> None:
        """In place of one that has not come to its end: the client has given that one up."""
        self._relinks += 1
        if self._relinks > self._config.max_relinks:
            raise ProtocolViolation(f"more than {self._config.max_relinks} successors for one session")
        self._session.last_active = trio.current_time()
        self._moving.cancel()
        self._relinking.cancel()
        self._relinking = trio.CancelScope()
        self._nursery.start_soon(self._relink, relink, self._relinking)

    async def _relink(self, relink: Relink, scope: trio.CancelScope) -> None:
        problem: RefusalCode | None = None
        with scope:
            try:
                await self._replay(relink)
            except SessionRefusal as refusal:
                problem = refusal.code
            except ReplayGap as exc:
                logger.debug("session.no_replay why=%s", exc)
                problem = "no_replay"
            except PeerVanished as exc:
                logger.debug("session.replay_lost peer=%s why=%s", relink.successor.peer_id, exc)
                problem = "successor_vanished"
        if not scope.cancelled_caught:
            with ending(self._session, client_gone="the client vanished"):
                await self._session.control.send(Relinked(relink.number, problem))

    async def _replay(self, relink: Relink) -> None:
        session, successor = self._session, relink.successor
        assert session.replay is not None
        pieces = session.replay.chunks(relink.start, relink.stop, relink.chunk_tokens)
        link = self._link_in_use(successor.peer_id)
        if link is None:
            former = session.standby
            if former is not None:
                session.standby = None
                await former.aclose()
            link = session.standby = await self._link_to(successor)
        if link is session.link:  # the replay runs through it, and what is under way will be sent again
            session.supersede(relink.epoch)
        await link.replay(pieces, hops=relink.replay, epoch=relink.epoch, window=relink.window)
        if not relink.switch:
            await link.all_filled()
            return
        former = session.switch(link, relink.epoch)
        self._host.counts.add("failovers")
        if former is not None and former is not link:
            await former.aclose()
        if link.is_lost:
            raise PeerVanished("it was lost while being fed", link.peer_id)

    def _link_in_use(self, peer_id: str) -> Link | None:
        for link in (self._session.standby, self._session.link):
            if link is not None and link.peer_id == peer_id and not link.is_lost:
                return link
        return None

    async def _answer(self, probe: Probe, asks_successor: bool) -> None:
        """Say that we are there, and if asked whether our successor is."""
        session = self._session
        try:
            answers: bool | None = None
            if session.opening.successor is not None and asks_successor:
                answers = session.link is not None and await session.link.probe(probe.within_ms / 1e3)
            with ending(session, client_gone="the client vanished"):
                await session.control.send(Alive(probe.number, answers))
        finally:
            self._probing.discard(asks_successor)
