"""Control of a running session: what its client says, and what the hop does about it.

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
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import chain
from typing import Final, TypeAlias

import msgspec
import trio

from p2pinfer.errors import NotAdmitted, PeerError, PeerRefused, PeerVanished, ProtocolViolation
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.link import Link
from p2pinfer.node.protocol.messages import (
    CHAIN_PROTOCOL,
    Alive,
    Attach,
    Attached,
    Expect,
    Message,
    Opened,
    Probe,
    RefusalCode,
    Relink,
    Relinked,
    Successor,
)
from p2pinfer.node.protocol.relay_upgrade import MOVE_S, is_worth_moving, leave_relays, note_moved
from p2pinfer.node.protocol.replay_log import LoggedStep, ReplayGap, ReplayLog
from p2pinfer.node.protocol.tensors import pack_hidden
from p2pinfer.node.transport.peer_stream import PeerStream

from .hop_session import HopSession
from .lifetime import SessionRefusal

logger = logging.getLogger(__name__)

FindAddrs: TypeAlias = Callable[[str, str], Awaitable[Sequence[str]]]  # of a peer that a client names


_ROUND_TRIPS: Final = (
    16  # that linking to a successor may take: a dial, perhaps by a relay, and an attachment
)


class SessionControl:
    """The tasks of one session between its admission and its end; `run` is all of them."""

    def __init__(
        self,
        session: HopSession,
        host: Network,
        config: ServeConfig,
        opened: Opened,
        on_expect: Callable[[], None],
        find_addrs: FindAddrs,
    ) -> None:
        """Set up; nothing happens before `run`.

        Args:
            on_expect: Called when the session has come to expect another predecessor.
            find_addrs: Gives the addresses at which a successor is dialled.
        """
        self._session = session
        self._neighbours = session.neighbours
        self._host = host
        self._config = config
        self._opened = opened
        self._on_expect = on_expect
        self._find_addrs = find_addrs
        self._relinking = trio.CancelScope()
        self._relinks = 0
        # What is being answered: whether we are there, whether our successor is.
        self._probing: set[bool] = set()
        self._moving = trio.CancelScope()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Run until the session ends, by whatever."""
        session = self._session
        with session.lifetime.scope():
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._link_and_send)
                self._nursery.start_soon(session.lifetime.end_when_idle, self._config.lease_s)
                if session.opening.successor is not None:
                    self._nursery.start_soon(leave_relays, self._host, self._links, self._move)
                with self._guard():
                    await self._read()

    def _guard(self) -> AbstractContextManager[None]:
        """Around whatever talks with the client."""
        return self._session.lifetime.guard(client_gone="the client vanished")

    async def _read(self) -> None:
        """Until the client says `End`, on whatever stream it goes on."""
        session, neighbours = self._session, self._neighbours
        feeds_us = session.opening.predecessor is None
        while True:
            with trio.CancelScope() as neighbours.reading:
                await session.read(neighbours.control, self._obey, has_steps=feeds_us)
                return session.lifetime.end(None)

    async def _obey(self, message: Message) -> None:
        """Do what the client asks for, or begin to: the reader never waits for it."""
        session = self._session
        match message:
            case Expect():
                self._neighbours.expect(message.predecessor)
                self._on_expect()
            case Relink() if session.opening.successor is not None:
                self._begin_relink(message)
            case Probe():
                asks_successor = message.within_ms > 0
                if asks_successor not in self._probing:
                    self._probing.add(asks_successor)
                    self._nursery.start_soon(self._answer, message, asks_successor)
            case _:
                raise ProtocolViolation(f"{type(message).__name__} in the middle of a session")

    # ------------------------------------------------------------------ the successor

    async def _link_and_send(self) -> None:
        session, neighbours = self._session, self._neighbours
        with self._guard():
            if session.opening.successor is not None:
                neighbours.link = link = await self._link_to(session.opening.successor)
                told = max(1, int(link.round_trip_s * 1e6))
                self._opened = msgspec.structs.replace(self._opened, successor_us=told)
            try:
                await neighbours.control.send(self._opened)
                await session.outbox.send_computed()
            finally:
                await neighbours.end_links()

    async def _link_to(self, successor: Successor) -> Link:
        with self._reaching(successor.peer_id):
            if not self._host.gate.admits(successor.peer_id, "nodes"):
                raise NotAdmitted("it is not admitted as a node", successor.peer_id)
            # The client says who comes next, and the peer itself where it is: `successor.addrs` could lead
            # anywhere.
            addrs: Sequence[str] = ()
            if self._host.connection_kind(successor.peer_id) is None:
                addrs = await self._find_addrs(successor.peer_id, self._session.client_id)
            stream = await self._host.open_stream(
                successor.peer_id, CHAIN_PROTOCOL, addrs, hearsay=True, optimistic=True
            )
            return await self._attach(stream)

    async def _attach(self, stream: PeerStream) -> Link:
        """A link over this stream to a successor that has agreed to take our steps."""
        chain = FrameStream(stream, max_payload_bytes=0, peer_id=stream.peer_id)
        try:
            await chain.send(Attach(self._session.opening.session))
            sent_at = trio.current_time()
            reply, _ = await chain.receive()
            if not isinstance(reply, Attached):
                raise PeerRefused(f"it answered {reply}", stream.peer_id)
        except BaseException:
            await stream.reset()
            raise
        link = Link(chain, self._neighbours.confirm_to_replayer, is_relayed=stream.is_relayed)
        # Of this moment. The client asks all hops at once, so the successor need not wait for its word.
        link.round_trip_s = trio.current_time() - sent_at
        self._nursery.start_soon(self._watch, link)
        return link

    @contextmanager
    def _reaching(self, peer_id: str) -> Generator[None]:
        """Take what goes wrong inside, or too long, for a successor that cannot be reached."""
        try:
            with self._host.within(self._config.dial_timeout_s, [peer_id], _ROUND_TRIPS) as patience:
                yield
            if patience.cancelled_caught:
                raise trio.TooSlowError
        except (PeerError, trio.TooSlowError) as exc:
            # What happened at which address is for our own log: a client could scan our network with it.
            logger.debug("session.no_successor peer=%s why=%s", peer_id, exc)
            raise SessionRefusal("successor_unreachable", "could not reach the next hop", peer_id) from exc

    def _links(self) -> list[Link]:
        """The link, while it may move."""
        link, prompt_at = self._neighbours.link, self._session.prompt_at
        return [link] if link is not None and is_worth_moving(prompt_at, link.line) else []

    async def _move(self, link: Link) -> bool:
        """Move the link to a direct connection; False if that failed, and no relinking came between."""
        moved = False
        with trio.CancelScope() as self._moving, self._guard():
            moved = await self._try_to_move(link)
        return moved or self._moving.cancelled_caught

    async def _try_to_move(self, link: Link) -> bool:
        neighbours = self._neighbours
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
            if neighbours.link is None:  # the successor had let go of the former one already
                await neighbours.refuse("successor_vanished", str(exc), link.peer_id)
            return False
        await link.aclose()
        return True

    async def _move_to(self, stream: PeerStream, link: Link) -> bool:
        """Nothing is sent on meanwhile: for a round trip on each of the two connections."""
        neighbours = self._neighbours
        async with neighbours.pausing:
            began_at = trio.current_time()
            if neighbours.link is not link or not await link.probe(link.line.patience_s(MOVE_S)):
                return False
            with self._reaching(link.peer_id):
                neighbours.link = await self._attach(stream)
            note_moved(self._host, link.peer_id, began_at)
            return True

    async def _watch(self, link: Link) -> None:
        neighbours = self._neighbours
        try:
            await link.watch()
        except PeerError as exc:
            logger.debug("session.link_lost peer=%s why=%s", link.peer_id, exc)
            with suppress(PeerVanished):  # the reader of the client's stream notices by itself
                await neighbours.lose(link, str(exc))
        finally:
            if neighbours.link is link:
                neighbours.link = None
            await link.aclose()

    # ------------------------------------------------------------------ what the client asks for

    def _begin_relink(self, relink: Relink) -> None:
        """In place of one that has not come to its end: the client has given that one up."""
        self._relinks += 1
        if self._relinks > self._config.max_relinks:
            raise ProtocolViolation(f"more than {self._config.max_relinks} successors for one session")
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
            with self._guard():
                await self._neighbours.control.send(Relinked(relink.number, problem))

    async def _replay(self, relink: Relink) -> None:
        neighbours, successor, log = self._neighbours, relink.successor, self._session.outbox.replay
        assert log is not None
        pieces = self._keeping_alive(self._pieces(log, relink))
        link = self._link_in_use(successor.peer_id)
        if link is None:
            former = neighbours.standby
            if former is not None:
                neighbours.standby = None
                await former.aclose()
            link = neighbours.standby = await self._link_to(successor)
        if link is neighbours.link:  # the replay runs through it, and what is under way will be sent again
            neighbours.supersede(relink.epoch)
        await link.replay(pieces, hops=relink.replay, epoch=relink.epoch, window=relink.window)
        if not relink.switch:
            await link.all_filled()
            return
        former = neighbours.switch(link, relink.epoch)
        self._host.counts.add("failovers")
        if former is not None and former is not link:
            await former.aclose()
        if link.is_lost:
            raise PeerVanished("it was lost while being fed", link.peer_id)

    def _pieces(self, log: ReplayLog, relink: Relink) -> Iterator[LoggedStep]:
        """Pieces of the log that are asked for, as they travel."""
        opening, tokens = self._session.opening, relink.chunk_tokens
        packed = min(max(opening.packed, relink.start), relink.stop)
        # Both are asked for now: what is logged meanwhile does not show, and a gap is told at once.
        rounded, plain = log.chunks(relink.start, packed, tokens), log.chunks(packed, relink.stop, tokens)
        return chain(
            (
                each._replace(payload=pack_hidden(each.payload, each.tokens, opening.codec))
                for each in rounded
            ),
            plain,
        )

    def _keeping_alive(self, pieces: Iterator[LoggedStep]) -> Iterator[LoggedStep]:
        """The pieces of a replay, which over a thin line takes longer than a lease lasts without a step."""
        for piece in pieces:
            self._session.lifetime.last_active = trio.current_time()
            yield piece

    def _link_in_use(self, peer_id: str) -> Link | None:
        for link in (self._neighbours.standby, self._neighbours.link):
            if link is not None and link.peer_id == peer_id and not link.is_lost:
                return link
        return None

    async def _answer(self, probe: Probe, asks_successor: bool) -> None:
        """Say that we are there, and if asked whether our successor is."""
        neighbours = self._neighbours
        try:
            answers: bool | None = None
            if self._session.opening.successor is not None and asks_successor:
                answers = await self._is_successor_there(probe.within_ms / 1e3)
            with self._guard():
                await neighbours.control.send(Alive(probe.number, answers))
        finally:
            self._probing.discard(asks_successor)

    async def _is_successor_there(self, within_s: float) -> bool:
        while True:
            link = self._neighbours.link
            is_there = link is not None and await link.is_there(within_s)
            # A link that was left by a move meanwhile is lost; the other one is asked.
            if is_there or self._neighbours.link is link:
                return is_there
