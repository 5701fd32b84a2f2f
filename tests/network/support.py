"""What several tests of real hosts need."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.transport.peer_stream import PeerStream

LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
DEAD = "/ip4/127.0.0.1/tcp/1"  # nobody listens there
ECHO = "/test/echo/1"

StartHost = Callable[..., Awaitable[Host]]


async def echo(stream: PeerStream) -> None:
    """Send back what comes, until it ends."""
    while received := await stream.receive_some():
        await stream.send_all(received)


def accept(host: Host, protocol: str) -> trio.MemoryReceiveChannel[PeerStream]:
    """A channel of the streams opened for `protocol`, which stay open until somebody closes them."""
    send, receive = trio.open_memory_channel[PeerStream](256)

    async def handle(stream: PeerStream) -> None:
        await send.send(stream)
        await trio.sleep_forever()

    host.serve(protocol, handle)
    return receive


async def receive_exactly(stream: PeerStream, size: int) -> bytes:
    """`size` bytes, or fewer if the stream ends before."""
    parts: list[bytes] = []
    while size and (received := await stream.receive_some(size)):
        parts.append(received)
        size -= len(received)
    return b"".join(parts)
