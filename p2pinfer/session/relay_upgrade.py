"""Upgrade of a client's streams from relayed to direct connections, in the middle of a session.

The stream to a hop that could only be reached through a relay stays on it when a hole has been punched, since
what is under way cannot change its connection. So a second stream is opened on the direct connection, and
between two steps the hop is told to go on there: one round trip. Links between hops do the same for
themselves (`node/serve/session_control.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import trio

from p2pinfer.errors import PeerError
from p2pinfer.node.host.host import Host
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL

from .hop_stream import HopStream

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.25  # between looks whether a stream can leave its relay
MOVE_S: Final = 5.0  # for one try, and until the next one


async def leave_relays(
    host: Host,
    session: bytes,
    hops: Callable[[], list[HopStream]],
    quiet: Callable[[], AbstractAsyncContextManager[None]],
    on_left: Callable[[HopStream, float], None],
) -> None:
    """Move streams for as long as it runs.

    Args:
        hops: Those of the session at the moment.
        quiet: While it is held no step is under way, and no hop is replaced.
        on_left: Called with a hop whose stream has moved, and for how many seconds no step could go out.
    """
    while True:
        await trio.sleep(LOOK_S)
        for hop in hops():
            if hop.is_relayed and host.connection_kind(hop.peer_id) == "direct":
                with trio.move_on_after(MOVE_S):
                    await _move(host, session, hop, hops, quiet, on_left)
                if hop.is_relayed:
                    await trio.sleep(MOVE_S)


async def _move(
    host: Host,
    session: bytes,
    hop: HopStream,
    hops: Callable[[], list[HopStream]],
    quiet: Callable[[], AbstractAsyncContextManager[None]],
    on_left: Callable[[HopStream, float], None],
) -> None:
    try:
        stream = await host.open_stream(hop.peer_id, SESSION_PROTOCOL)
        frames = FrameStream(stream, max_payload_bytes=0, peer_id=hop.peer_id)
        try:
            async with quiet():
                if hop in hops() and not stream.is_relayed:
                    began_at = trio.current_time()
                    await hop.move(session, frames)
                    pause_s = trio.current_time() - began_at
                    logger.debug("session.moved peer=%s pause_ms=%.0f", hop.peer_id, pause_s * 1e3)
                    host.counts.add("upgrades")
                    on_left(hop, pause_s)
        finally:
            if hop.is_relayed:
                await stream.reset()
    except PeerError as exc:
        logger.debug("session.not_moved peer=%s why=%s", hop.peer_id, exc)
