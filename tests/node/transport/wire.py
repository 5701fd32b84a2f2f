"""A muxer's peer made of bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID

from p2pinfer.node.concurrency.loop_share import LoopShares
from p2pinfer.node.transport.connection_gate import Gate
from p2pinfer.node.transport.line_rate import LineRate, Uplink
from p2pinfer.node.transport.yamux import YamuxConnection
from p2pinfer.node.transport.yamux_frames import (
    ACK,
    DATA,
    HEADER,
    PING,
    SYN,
    WINDOW_UPDATE,
)
from p2pinfer.node.transport.yamux_stream import YamuxStream

Frame = tuple[int, int, int, int, bytes]


class Raw:
    """What is measured below."""

    def __init__(self) -> None:
        self.rate = LineRate()
        self.queued_bytes = 0
        self.rtt_s = self.least_rtt_s = self.expected_rtt_s = 0.0
        self.uplink = Uplink()

    async def until_crowded(self) -> None:
        await self.uplink.until_crowded()

    def expect_round_trip(self, rtt_s: float, latest_s: float = 0.0) -> None:
        self.rtt_s = rtt_s
        self.least_rtt_s = min(self.least_rtt_s or latest_s, latest_s)


class Wire:
    """A secured connection whose other end is the test."""

    def __init__(self, *, is_initiator: bool) -> None:
        self.is_initiator = is_initiator
        self.closed = False
        self.stalled = False  # whether writes wait
        self.takes_at_once = True
        self.raw = Raw()
        self.meter = LoopShares().meter("peer", "11.0.0.0/24")
        self._arriving, self._arrived = trio.open_memory_channel[bytes](1000)
        self.sent: list[bytes] = []

    async def read(self, n: int | None = None) -> bytes:
        try:
            return await self._arrived.receive()
        except trio.EndOfChannel:
            raise ConnectionClosedError("closed") from None

    async def write(self, data: bytes) -> None:
        if self.closed:
            raise ConnectionClosedError("closed")
        self.sent.append(data)
        if self.stalled:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()

    @property
    def is_clear(self) -> bool:
        return self.takes_at_once

    def write_now(self, data: bytes) -> bool:
        if self.takes_at_once:
            self.sent.append(data)
        return self.takes_at_once

    async def close(self) -> None:
        self.closed = True
        self._arriving.close()

    def get_transport_addresses(self) -> list[Any]:
        return []

    def get_connection_type(self) -> str:
        return "direct"

    def get_remote_address(self) -> tuple[str, int]:
        return ("192.0.2.1", 4001)

    def put(self, data: bytes) -> None:
        self._arriving.send_nowait(data)

    def frame(self, kind: int, flags: int, stream_id: int, length: int, body: bytes = b"") -> None:
        self.put(HEADER.pack(0, kind, flags, stream_id, length) + body)

    def taken(self) -> list[Frame]:
        """The frames that were sent since the last call: kind, flags, stream, length, body."""
        data = b"".join(self.sent)
        frames: list[Frame] = []
        self.sent.clear()
        while data:
            version, kind, flags, stream_id, length = HEADER.unpack_from(data)
            assert version == 0
            body_bytes = length if kind == DATA else 0
            frames.append((kind, flags, stream_id, length, data[12 : 12 + body_bytes]))
            data = data[12 + body_bytes :]
        return [frame for frame in frames if frame[:2] != (PING, SYN)]


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def running(
    *, is_initiator: bool = True, max_streams: int = 4, gate: Gate | None = None
) -> AsyncGenerator[tuple[YamuxConnection, Wire]]:
    wire = Wire(is_initiator=is_initiator)
    connection = YamuxConnection(cast(Any, wire), ID(b"peer"), max_streams=max_streams, gate=gate)
    with trio.fail_after(100_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.start)
            await settle()
            yield connection, wire
            await connection.close()


async def accepted(connection: YamuxConnection, wire: Wire, stream_id: int = 2) -> YamuxStream:
    """A stream that the peer opened, with the acknowledgement taken off the wire."""
    wire.frame(WINDOW_UPDATE, SYN, stream_id, 0)
    stream = await connection.accept_stream()
    await settle()
    assert (WINDOW_UPDATE, ACK, stream_id, 0, b"") in wire.taken()
    return stream
