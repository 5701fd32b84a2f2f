"""Values behind their lengths and the contents that follow them, read from one stream."""

from __future__ import annotations

import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation

_RECEIVE_BYTES = 1 << 18


class Frames:
    """Reads what a peer sends: values of bounded size, and contents of a size that was agreed on."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def value(self, limit: int) -> bytes | None:
        """The next value, of `limit` bytes at most; None if the stream ends before one.

        Raises:
            PeerVanished: It ends within one.
            ProtocolViolation: It is larger.
        """
        while len(self._buffer) < 4:
            if not await self._receive():
                if self._buffer:
                    raise PeerVanished("the stream ended in the middle of a message")
                return None
        size = int.from_bytes(self._buffer[:4], "big")
        if size > limit:
            raise ProtocolViolation(f"a message of {size} bytes; {limit} are allowed")
        content = await self._exactly(4 + size)
        return content[4:]

    async def content(self, size: int) -> bytes:
        """The next `size` bytes.

        Raises:
            PeerVanished: The stream ends before.
        """
        return await self._exactly(size)

    async def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            if not await self._receive():
                raise PeerVanished("the stream ended in the middle of a message")
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        return content

    async def _receive(self) -> bool:
        try:
            received = await self._stream.receive_some(_RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise PeerVanished("the stream broke in the middle of a message") from exc
        self._buffer += received
        return bool(received)
