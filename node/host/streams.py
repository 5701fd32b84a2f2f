"""Streams of one protocol on a libp2p connection: opened to a peer, and answered for it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from libp2p.custom_types import TProtocol

from p2pinfer.errors import PeerError
from p2pinfer.node.concurrency.loop_share import clocked
from p2pinfer.node.concurrency.nurseries import innermost
from p2pinfer.node.transport.multistream import negotiate
from p2pinfer.node.transport.peer_stream import PeerStream

from .network import Handler

logger = logging.getLogger(__name__)


async def open_stream_on(connection: Any, protocol: str, peer_id: str) -> PeerStream:
    """Open a stream that speaks `protocol` on a connection to `peer_id`."""
    stream = await connection.new_stream()
    try:
        await negotiate(stream.muxed_stream, protocol, peer_id)
    except BaseException:
        await PeerStream(stream, peer_id).reset()
        raise
    stream.set_protocol(TProtocol(protocol))
    return PeerStream(stream, peer_id)


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
