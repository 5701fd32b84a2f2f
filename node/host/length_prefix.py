"""One value behind a big-endian u32 length, the form of small requests between peers."""

from __future__ import annotations

from collections.abc import Callable

import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation


async def send_value(stream: trio.abc.SendStream, content: bytes) -> None:
    """Send one value."""
    await stream.send_all(len(content).to_bytes(4, "big") + content)


async def receive_value(
    stream: trio.abc.ReceiveStream, limit: int, on_progress: Callable[[int], None] = lambda size: None
) -> bytes:
    """The next value, of `limit` bytes at most; whatever follows it is dropped.

    Args:
        on_progress: Called with the number of bytes that have come, whenever some have.

    Raises:
        PeerVanished: The stream ended before it was complete.
        ProtocolViolation: It is larger.
    """
    buffer = bytearray()
    size = 4
    while len(buffer) < size:
        received = await stream.receive_some(1 << 16)
        if not received:
            raise PeerVanished("the stream ended in the middle of a message")
        buffer += received
        on_progress(len(buffer))
        if size == 4 and len(buffer) >= 4:
            size = 4 + int.from_bytes(buffer[:4], "big")
            if size > limit + 4:
                raise ProtocolViolation(f"a message of {size - 4} bytes; {limit} are allowed")
    return bytes(buffer[4:size])
