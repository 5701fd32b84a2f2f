"""A byte stream to a peer: trio's Stream over a libp2p stream, with one error for every way to lose it."""

from __future__ import annotations

import math
from typing import Any

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.exceptions import StreamEOF

from p2pinfer.errors import PeerVanished

from .shield import shielded

PIECE_BYTES = 65536  # what is written at once; a cancelled send ends between two of these
READ_BYTES = 65536


class PeerStream(trio.abc.Stream):
    """One stream to `peer_id`, opened by `Host.open_stream` or handed to a handler of `Host.serve`.

    One task may send while another receives. Everything libp2p raises comes out as `PeerVanished`.
    """

    def __init__(self, stream: Any, peer_id: str) -> None:
        self.peer_id = peer_id
        self._stream = stream
        self._closed = False
        self._sending = False
        self._receiving = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`.

        Cancelled in the middle, it resets the stream: the peer would take what follows for the rest.

        Raises:
            PeerVanished: The peer, the stream or the connection is gone.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await self._send_pieces(memoryview(data))
        finally:
            self._sending = False

    async def _send_pieces(self, data: memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")
        sent = 0
        try:
            while sent < len(data):
                with shielded(math.inf):
                    await self._stream.write(bytes(data[sent : sent + PIECE_BYTES]))
                sent += PIECE_BYTES
                if sent < len(data):
                    await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            await self.reset()
            raise
        except (BaseLibp2pError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise PeerVanished(f"peer {self.peer_id} is gone while sending to it", self.peer_id) from exc

    async def wait_send_all_might_not_block(self) -> None:
        """Does not wait: libp2p does not say when a peer has room again."""
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived, at most `max_bytes`; b"" once the peer has closed its side.

        Raises:
            PeerVanished: The peer reset the stream, or the connection is gone.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("this stream is closed")
            return bytes(await self._stream.read(max_bytes or READ_BYTES))
        except StreamEOF:
            return b""
        except (BaseLibp2pError, OSError, trio.BrokenResourceError) as exc:
            raise PeerVanished(f"peer {self.peer_id} is gone", self.peer_id) from exc
        finally:
            self._receiving = False

    async def aclose(self) -> None:
        """Close both directions; what was sent still arrives. Harmless twice."""
        if not self._closed:
            self._closed = True
            with shielded(1):
                try:
                    await self._stream.close()
                except (BaseLibp2pError, OSError):
                    await self._stream.reset()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Close at once, and let the peer see an error instead of an end. Harmless twice."""
        self._closed = True
        with shielded(1):
            await self._stream.reset()
