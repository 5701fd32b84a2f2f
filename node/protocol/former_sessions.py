"""Clients of an earlier version, which are told why they get no session."""

from __future__ import annotations

from contextlib import aclosing
from typing import Final

import trio

from p2pinfer.node.host.network import Network
from p2pinfer.node.transport.peer_stream import PeerStream

from .frames import FrameStream
from .messages import FORMER_SESSION_PROTOCOL, Refused

_WITHIN_S: Final = 10.0
_WHY: Final = (
    "this node signs receipts that your version of p2pinfer does not read; update it: pip install -U p2pinfer"
)


def serve_former_clients(host: Network) -> None:
    """Answer the former protocol of sessions with a sentence from now on."""
    host.serve(FORMER_SESSION_PROTOCOL, _turn_away)


async def _turn_away(stream: PeerStream) -> None:
    async with aclosing(stream):
        frames = FrameStream(stream, max_payload_bytes=0)
        with trio.move_on_after(_WITHIN_S):
            await frames.receive()
            await frames.send(Refused("protocol", _WHY))
            await frames.end()
