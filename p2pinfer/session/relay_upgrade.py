"""Upgrade of a client's streams from relayed to direct connections, in the middle of a session.

Between two steps the hop is told to go on with a stream on the direct connection: one round trip. Links
between hops do the same for themselves (`node/serve/session_control.py`); when it is tried is the same for
both (`node/protocol/relay_upgrade.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from p2pinfer.errors import PeerError
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol import relay_upgrade
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL

from .hop_stream import HopStream

logger = logging.getLogger(__name__)


async def leave_relays(
    host: Network,
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

    async def move(hop: HopStream) -> bool:
        with trio.move_on_after(hop.line.patience_s(relay_upgrade.MOVE_S)) as patience:
            await _move(host, session, hop, hops, quiet, on_left, patience)
        return not hop.is_relayed

    await relay_upgrade.leave_relays(host, hops, move)


async def _move(
    host: Network,
    session: bytes,
    hop: HopStream,
    hops: Callable[[], list[HopStream]],
    quiet: Callable[[], AbstractAsyncContextManager[None]],
    on_left: Callable[[HopStream, float], None],
    patience: trio.CancelScope,
) -> None:
    try:
        stream = await host.open_stream(hop.peer_id, SESSION_PROTOCOL)
        frames = FrameStream(stream, max_payload_bytes=0, peer_id=hop.peer_id)
        try:
            async with quiet():
                if hop in hops() and not stream.is_relayed:
                    began_at = trio.current_time()
                    # A limit of its own: who stops here, when the hop may have moved, has lost the session.
                    patience.deadline = began_at + frames.line.patience_s(relay_upgrade.MOVE_S)
                    await hop.move(session, frames)
                    on_left(hop, relay_upgrade.note_moved(host, hop.peer_id, began_at))
        finally:
            if hop.is_relayed:
                await stream.reset()
    except PeerError as exc:
        logger.debug("session.not_moved peer=%s why=%s", hop.peer_id, exc)
