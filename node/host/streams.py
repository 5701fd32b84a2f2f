"""Streams of one protocol on a libp2p connection: opened to a peer, and answered for it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError

from p2pinfer.errors import NotAdmitted, PeerError, PeerRefused, PeerUnreachable
from p2pinfer.node.concurrency.loop_share import clocked
from p2pinfer.node.concurrency.nurseries import innermost
from p2pinfer.node.transport.multistream import Proposal
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.transport.yamux_stream import StreamRefused, YamuxStream

from .network import Handler

logger = logging.getLogger(__name__)


async def open_stream_on(connection: Any, agreement: Agreement, optimistic: bool) -> PeerStream:
    """Open a stream on a connection of the swarm; see `Host.open_stream`."""
    stream = await agreement.propose(connection)
    if not optimistic:
        try:
            await stream.confirm()
        except BaseException:
            await stream.reset()
            raise
    return stream


class Agreement:
    """Agreement of a peer to a protocol. What prevents it has the same errors whenever it is noticed."""

    def __init__(
        self,
        protocol: str,
        peer_id: str,
        limit: Callable[[], AbstractContextManager[trio.CancelScope]],
        turned_away: Callable[[], NotAdmitted | None],
    ) -> None:
        """Nothing is sent yet.

        Args:
            limit: Ends what waits for the peer.
            turned_away: Says whether the peer does not let us in, asked after an error.
        """
        self._proposal = Proposal(protocol, peer_id)
        self._peer_id = peer_id
        self._limit = limit
        self._turned_away = turned_away

    async def propose(self, connection: Any) -> PeerStream:
        """Open a stream and send the proposal."""
        with self._in_time():
            raw = await connection.new_stream()
            stream = PeerStream(raw, self._peer_id, self)
            try:
                await raw.muxed_stream.write(self._proposal.lines)
            except BaseException:
                await stream.reset()
                raise
            raw.set_protocol(TProtocol(self._proposal.protocol))
        return stream

    async def read(self, muxed: YamuxStream) -> None:
        """Read the peer's agreement."""
        with self._in_time():
            await self._proposal.read_agreement(muxed)

    def explain(self, exc: BaseLibp2pError) -> PeerError:
        """The error for one of libp2p's."""
        peer_id = self._peer_id
        if isinstance(exc, StreamRefused):
            return PeerRefused(f"peer {peer_id} opens no more streams: {exc}", peer_id, "busy")
        lost = PeerUnreachable(f"peer {peer_id} was lost while opening a stream: {exc}", peer_id)
        return self._turned_away() or lost

    @contextmanager
    def _in_time(self) -> Generator[None]:
        began_at, peer_id = trio.current_time(), self._peer_id
        try:
            with self._limit() as scope:
                yield
        except BaseLibp2pError as exc:
            raise self.explain(exc) from exc
        if scope.cancelled_caught:
            within_s = round(trio.current_time() - began_at, 1)
            raise PeerUnreachable(f"peer {peer_id} opened no stream within {within_s:g} s", peer_id)


def answering(protocol: str, handler: Handler, is_metered: bool = True) -> Callable[[Any], Awaitable[None]]:
    """Give libp2p `handler` for `protocol`: it closes the stream after it, and resets it when it raises.

    A `PeerError` is the peer's own doing; any other exception is a bug of ours, and logged as such.
    """

    async def handle(raw_stream: Any) -> None:
        stream = PeerStream(raw_stream, str(raw_stream.muxed_conn.peer_id))
        try:
            if is_metered:
                await clocked(_run(handler, stream), stream.meter.spend)
            else:
                await handler(stream)
        except Exception as exc:
            if _is_peers_fault(exc):
                logger.debug(
                    "stream.failed protocol=%s peer=%s why=%s", protocol, stream.peer_id, innermost(exc)
                )
            else:
                logger.exception("the handler of %s failed", protocol)
            await stream.reset()
        except BaseException:
            await stream.reset()
            raise
        else:
            await stream.aclose()

    return handle


async def _run(handler: Handler, stream: PeerStream) -> None:
    await handler(stream)


def _is_peers_fault(exc: Exception) -> bool:
    if isinstance(exc, ExceptionGroup):
        return exc.split(PeerError)[1] is None
    return isinstance(exc, PeerError)
