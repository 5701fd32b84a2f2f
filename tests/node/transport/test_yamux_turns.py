"""The muxer on a thin line: what goes first, and who takes turns."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedStreamClosed,
)

from p2pinfer.node.transport.yamux import YamuxConnection
from p2pinfer.node.transport.yamux_frames import (
    DATA,
    HEADER,
    PING,
)

from .wire import Wire


class ThinWire(Wire):
    """A wire that takes so many bytes a second, and remembers when each frame was through."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(is_initiator=True)
        self.through: list[tuple[float, bytes]] = []
        self._bytes_per_s = bytes_per_s
        self._line = trio.Lock()

    async def write(self, data: bytes) -> None:
        async with self._line:
            offered_at = trio.current_time()
            await trio.sleep(len(data) / self._bytes_per_s)
            self.raw.rate.note(len(data), offered_at, trio.current_time())
            self.through.append((trio.current_time(), data))

    @property
    def is_clear(self) -> bool:
        return not self._line.locked()

    def write_now(self, data: bytes) -> bool:
        return False


@asynccontextmanager
async def on_a_thin_line(bytes_per_s: float) -> AsyncGenerator[tuple[YamuxConnection, ThinWire]]:
    wire = ThinWire(bytes_per_s)
    connection = YamuxConnection(cast(Any, wire), ID(b"peer"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.start)
        yield connection, wire
        nursery.cancel_scope.cancel()


async def test_a_ping_overtakes_a_prompt(autojump_clock: trio.testing.MockClock) -> None:
    """250 KB take 8 s at 0.25 Mbit/s; whoever asks for a sign of life in between does not wait for them."""
    async with on_a_thin_line(31_250) as (connection, wire), trio.open_nursery() as nursery:
        stream = await connection.open_stream()
        nursery.start_soon(stream.write, bytes(250_000))
        waits: list[float] = []
        for _ in range(5):
            await trio.sleep(1.0)
            asked_at = trio.current_time()
            wire.through.clear()
            nursery.start_soon(connection.ping)
            await trio.sleep(0.9)
            waits.append(
                next(at for at, frame in wire.through if HEADER.unpack_from(frame)[1] == PING) - asked_at
            )
        assert max(waits) < 0.6  # behind the first frames of a line that was not measured yet
        assert max(waits[1:]) < 0.2
        nursery.cancel_scope.cancel()


async def test_streams_take_turns_frame_by_frame(autojump_clock: trio.testing.MockClock) -> None:
    """A step of 8 KB beside a prompt of 250 KB goes out within a few frames of it, and neither is torn."""
    async with on_a_thin_line(31_250) as (connection, wire), trio.open_nursery() as nursery:
        prompt, step = await connection.open_stream(), await connection.open_stream()
        nursery.start_soon(prompt.write, b"p" * 250_000)
        await trio.sleep(2.0)
        asked_at = trio.current_time()
        await step.write(b"s" * 8_000)
        assert trio.current_time() - asked_at < 1.0
        frames = [(*HEADER.unpack_from(frame), frame[HEADER.size :]) for _, frame in wire.through]
        said = {
            stream_id: b"".join(body for _, kind, _, of, _, body in frames if (kind, of) == (DATA, stream_id))
            for stream_id in (prompt.stream_id, step.stream_id)
        }
        assert said[step.stream_id] == b"s" * 8_000
        assert set(said[prompt.stream_id]) == {ord("p")}
        nursery.cancel_scope.cancel()


async def test_a_stream_that_ends_while_its_writer_waits_sends_nothing_after_its_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with on_a_thin_line(31_250) as (connection, wire), trio.open_nursery() as nursery:
        first, second = await connection.open_stream(), await connection.open_stream()
        nursery.start_soon(first.write, bytes(200_000))
        await trio.sleep(1.0)

        async def write_in_vain() -> None:
            with pytest.raises(MuxedStreamClosed):
                await second.write(bytes(8_000))
            assert second.bytes_sent == 0

        nursery.start_soon(write_in_vain)
        await trio.sleep(0.01)
        second.end()
        await trio.sleep(2.0)
        kinds = [HEADER.unpack_from(frame) for _, frame in wire.through]
        assert not [each for each in kinds if each[1] == DATA and each[3] == second.stream_id]
        nursery.cancel_scope.cancel()
