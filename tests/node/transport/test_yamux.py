"""The muxer against a peer made of bytes: what it sends, what it tolerates, what it does not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamError,
    MuxedStreamReset,
)

from p2pinfer.node.concurrency.loop_share import LoopShares
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.transport import yamux
from p2pinfer.node.transport.connection_gate import GATED, RATE_LIMITED, RESOURCE_LIMIT_EXCEEDED, Gate
from p2pinfer.node.transport.line_rate import LineRate
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.transport.yamux import YamuxConnection
from p2pinfer.node.transport.yamux_frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    MAX_PAYLOAD,
    PING,
    RST,
    SMALL_BYTES,
    SYN,
    WINDOW_UPDATE,
)
from p2pinfer.node.transport.yamux_stream import StreamRefused, YamuxStream

Frame = tuple[int, int, int, int, bytes]


class Raw:
    """What is measured below."""

    def __init__(self) -> None:
        self.rate = LineRate()
        self.queued_bytes = 0
        self.rtt_s = self.least_rtt_s = self.expected_rtt_s = 0.0

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


async def test_opening_writing_and_ending_a_stream(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as (connection, wire):
        stream = await connection.open_stream()
        await stream.write(b"hello")
        await stream.close()
        await settle()
        assert wire.taken() == [
            (WINDOW_UPDATE, SYN, 1, 0, b""),
            (DATA, 0, 1, 5, b"hello"),
            (WINDOW_UPDATE, FIN, 1, 0, b""),
        ]
        with pytest.raises(MuxedStreamClosed):
            await stream.write(b"more")
        wire.frame(DATA, ACK | FIN, 1, 3, b"bye")
        assert await stream.read() == b"bye"
        with pytest.raises(MuxedStreamEOF):
            await stream.read()
        assert (await connection.open_stream()).stream_id == 3


async def test_the_side_that_did_not_dial_uses_even_ids() -> None:
    async with running(is_initiator=False) as (connection, _):
        assert (await connection.open_stream()).stream_id == 2


async def test_reads_take_what_is_there_and_no_more_than_asked_for() -> None:
    async with running() as (connection, wire):
        stream = await accepted(connection, wire)
        assert await stream.read(0) == b""
        for piece in (b"abc", b"def", b"ghi"):
            wire.frame(DATA, 0, 2, 3, piece)
        await settle()
        assert await stream.read(1) == b"a"
        assert await stream.read(1) == b"b"
        assert await stream.read(5) == b"cdefg"
        assert await stream.read(-1) == b"hi"
        for piece in (b"x" * SMALL_BYTES, b"y" * SMALL_BYTES):
            wire.frame(DATA, 0, 2, SMALL_BYTES, piece)
        await settle()
        assert await stream.read(SMALL_BYTES + 1) == b"x" * SMALL_BYTES
        assert await stream.read(-1) == b"y" * SMALL_BYTES


async def test_a_window_is_granted_again_when_half_of_it_was_read() -> None:
    async with running() as (connection, wire):
        stream = await accepted(connection, wire)
        half = INITIAL_WINDOW // 2
        wire.frame(DATA, 0, 2, half, bytes(half))
        await stream.read(half - 1)
        await settle()
        assert wire.taken() == []
        await stream.read(1)
        await settle()
        assert wire.taken() == [(WINDOW_UPDATE, 0, 2, half, b"")]


async def test_a_window_grows_for_a_fast_reader_up_to_a_limit(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yamux, "MAX_GROWTH", INITIAL_WINDOW)
    async with running() as (connection, wire):
        connection.rtt_s = 1.0
        stream = await accepted(connection, wire)
        for window, granted in (
            (INITIAL_WINDOW, INITIAL_WINDOW // 2 + INITIAL_WINDOW),
            (2 * INITIAL_WINDOW, INITIAL_WINDOW),  # the connection's allowance is spent
        ):
            assert stream.window == window
            wire.frame(DATA, 0, 2, window // 2, bytes(window // 2))
            while sum(len(frame) for frame in wire.sent) == 0:
                await stream.read()
                await settle()
            assert wire.taken() == [(WINDOW_UPDATE, 0, 2, granted, b"")]
        await stream.reset()
        assert connection.grow(INITIAL_WINDOW) == INITIAL_WINDOW  # the allowance is free again


async def test_a_writer_waits_for_the_window_as_long_as_it_takes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as (connection, wire):
        stream = await connection.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, bytes(INITIAL_WINDOW + 10))
            await settle()
            wire.taken()
            await trio.sleep(3600)
            wire.frame(WINDOW_UPDATE, ACK, 1, 4)
            await settle()
            assert wire.taken()[-1] == (DATA, 0, 1, 4, bytes(4))
            wire.frame(WINDOW_UPDATE, 0, 1, 100)
        assert wire.taken() == [(DATA, 0, 1, 6, bytes(6))]


async def test_frames_fit_one_noise_message() -> None:
    async with running() as (connection, wire):
        wire.raw.least_rtt_s = 0.001  # of a local network, where frames are as long as can be
        stream = await connection.open_stream()
        await stream.write(bytes(2 * MAX_PAYLOAD + 1))
        assert [frame[3] for frame in wire.taken()] == [0, MAX_PAYLOAD, MAX_PAYLOAD, 1]
        assert MAX_PAYLOAD + HEADER.size + 16 == 65535


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30))
def test_frames_may_be_cut_anywhere(sizes: list[int]) -> None:
    wire_bytes = b"".join(
        HEADER.pack(0, DATA, 0, 2, len(body)) + body for body in (b"", b"a" * 30, b"b", b"c" * 5)
    ) + HEADER.pack(0, WINDOW_UPDATE, FIN, 2, 0)

    async def check() -> None:
        async with running() as (connection, wire):
            stream = await accepted(connection, wire)
            rest = wire_bytes
            for size in [*sizes, len(rest)]:
                wire.put(rest[:size])
                rest = rest[size:]
            await settle()
            assert await stream.read() == b"a" * 30 + b"b" + b"c" * 5
            with pytest.raises(MuxedStreamEOF):
                await stream.read()

    trio.run(check)


async def test_a_reset_can_follow_what_was_sent() -> None:
    async with running() as (connection, wire):
        stream = await accepted(connection, wire)
        wire.frame(DATA, RST, 2, 2, b"ab")
        await settle()
        assert await stream.read() == b"ab"
        with pytest.raises(MuxedStreamReset):
            await stream.read()
        with pytest.raises(MuxedStreamReset):
            await stream.write(b"x")
        await stream.reset()
        await stream.close()
        await settle()
        assert wire.taken() == []  # it is over; there is nothing to say


async def test_what_arrives_for_a_stream_that_is_over_is_skipped() -> None:
    async with running() as (connection, wire):
        gone, stays = await accepted(connection, wire, 2), await accepted(connection, wire, 4)
        await gone.reset()
        wire.frame(DATA, 0, 2, 4, b"late")
        wire.frame(WINDOW_UPDATE, FIN, 2, 0)
        wire.frame(DATA, 0, 4, 4, b"mine")
        assert await stays.read() == b"mine"
        await settle()
        assert wire.taken() == [(WINDOW_UPDATE, RST, 2, 0, b"")]


async def test_input_after_we_stopped_reading_is_answered_with_a_reset() -> None:
    async with running() as (connection, wire):
        stream = await accepted(connection, wire)
        await stream.close()
        stream.discard()
        stream.discard()
        with pytest.raises(MuxedStreamClosed):
            await stream.read()
        wire.frame(DATA, 0, 2, 1, b"x")
        await settle()
        assert wire.taken() == [(WINDOW_UPDATE, FIN, 2, 0, b""), (WINDOW_UPDATE, RST, 2, 0, b"")]


async def test_a_stream_the_peer_never_ends_is_swept_away(autojump_clock: trio.testing.MockClock) -> None:
    async with running(max_streams=1) as (connection, wire):
        stream = await accepted(connection, wire)
        await stream.close()
        stream.discard()
        wire.frame(PING, ACK, 0, 0)
        await trio.sleep(200)
        assert (WINDOW_UPDATE, RST, 2, 0, b"") in wire.taken()
        await accepted(connection, wire, 4)


async def test_more_streams_than_allowed_are_refused() -> None:
    async with running(max_streams=2) as (connection, wire):
        await accepted(connection, wire, 2)
        second = await accepted(connection, wire, 4)
        wire.frame(WINDOW_UPDATE, SYN, 6, 0)
        await settle()
        assert wire.taken() == [(WINDOW_UPDATE, RST, 6, RESOURCE_LIMIT_EXCEEDED, b"")]
        await second.reset()
        await accepted(connection, wire, 8)


async def test_streams_that_come_faster_than_they_are_accepted_are_refused() -> None:
    async with running(max_streams=2) as (_, wire):
        for stream_id in (2, 4, 6):
            wire.frame(WINDOW_UPDATE, SYN, stream_id, 0)
            wire.frame(WINDOW_UPDATE, RST, stream_id, 0)
        await settle()
        assert (WINDOW_UPDATE, RST, 6, RESOURCE_LIMIT_EXCEEDED, b"") in wire.taken()


async def test_the_gate_decides_about_streams_and_hears_when_they_end() -> None:
    gate = Gate(HostConfig(streams_at_once=2, streams_per_s=0.001))
    async with running(gate=gate) as (connection, wire):
        await accepted(connection, wire, 2)
        second = await accepted(connection, wire, 4)
        assert gate.streams == 2
        wire.frame(WINDOW_UPDATE, SYN, 6, 0)
        await settle()
        assert wire.taken() == [(WINDOW_UPDATE, RST, 6, RATE_LIMITED, b"")]
        await second.reset()
        assert gate.streams == 1
        wire.frame(GO_AWAY, 0, 0, GATED)
        await settle()
        assert gate.take_turned_away(str(connection.peer_id))
        assert gate.streams == 0


async def test_a_reset_with_a_reason_is_told_from_one_without() -> None:
    async with running() as (connection, wire):
        for code, error in ((0, MuxedStreamReset), (RESOURCE_LIMIT_EXCEEDED, StreamRefused)):
            stream = await connection.open_stream()
            wire.frame(WINDOW_UPDATE, RST, stream.stream_id, code)
            with pytest.raises(MuxedStreamReset) as caught:
                await stream.read()
            assert type(caught.value) is error


async def test_small_pieces_that_nobody_reads_are_put_together() -> None:
    async with running() as (connection, wire):
        stream = await accepted(connection, wire)
        sent = bytes(range(256)) * 40
        for at in range(0, len(sent), 2):
            wire.frame(DATA, 0, 2, 2, sent[at : at + 2])
            if at % 1000 == 0:
                await settle()
        await settle()
        assert len(stream._inbox) <= 1 + len(sent) // (SMALL_BYTES // 2)  # pyright: ignore[reportPrivateUsage]
        received = await stream.read(3)
        for _ in range(20):
            wire.frame(DATA, 0, 2, 1, b"!")
        await settle()
        while len(received) < len(sent):
            received += await stream.read(min(700, len(sent) - len(received)))
        assert received == sent
        assert set(await stream.read()) == {ord("!")}


async def test_a_send_that_is_cancelled_when_all_of_it_is_on_its_way_harms_nothing() -> None:
    async with running() as (connection, wire):
        muxed = await connection.open_stream()
        stream = PeerStream(SimpleNamespace(muxed_stream=muxed), "peer")
        wire.taken()
        wire.stalled = True
        for data in (b"all of it", bytes(INITIAL_WINDOW + 1)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                await settle()
                nursery.cancel_scope.cancel()
            if data == b"all of it":
                assert wire.taken() == [(DATA, 0, 1, 9, b"all of it")]
        wire.stalled = False
        await settle()
        assert (WINDOW_UPDATE, RST, 1, 0, b"") in wire.taken()


async def test_pings_are_answered_and_measured(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as (connection, wire):
        wire.frame(PING, SYN, 0, 77)
        await settle()
        assert wire.taken() == [(PING, ACK, 0, 77, b"")]
        wire.frame(PING, ACK, 0, 12345)  # to nothing we asked
        rtts: list[float] = []
        wire.raw.expected_rtt_s = 3.0
        assert connection.line.rtt_s == 3.0  # patience before the first answer

        async def ping() -> None:
            rtts.append(await connection.ping())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping)
            await trio.sleep(0.5)
            wire.frame(PING, ACK, 0, 1)
        assert rtts == [pytest.approx(0.5)]
        assert connection.rtt_s == connection.line.rtt_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    "frame",
    [
        (1, DATA, 0, 2, 0),  # the version
        (0, 7, 0, 0, 0),  # the type
        (0, DATA, SYN, 3, 0),  # one of our ids
        (0, DATA, SYN, 0, 0),
        (0, DATA, SYN, 2, 0),  # open already
        (0, DATA, 0, 2, INITIAL_WINDOW + 1),
        (0, WINDOW_UPDATE, 0, 2, 0xFFFFFFFF),
    ],
)
async def test_a_violation_ends_the_connection_and_says_so(frame: tuple[int, ...]) -> None:
    async with running() as (connection, wire):
        stream = await accepted(connection, wire)
        wire.put(HEADER.pack(*frame))
        wire.put(HEADER.pack(*frame))
        with pytest.raises(MuxedStreamReset):
            await stream.read()
        await settle()
        assert wire.taken() == [(GO_AWAY, 0, 0, 1, b"")]
        assert wire.closed
        assert connection.is_closed


async def test_a_peer_that_asks_and_does_not_read_is_cut_off() -> None:
    async with running() as (connection, wire):
        wire.stalled = True
        for _ in range(3):
            wire.put(HEADER.pack(0, PING, SYN, 0, 1) * 4000)
            await settle()
        assert connection.is_closed


@pytest.mark.parametrize("how", ["goodbye", "close", "ours"])
async def test_the_end_reaches_everybody_who_waits(how: str, autojump_clock: trio.testing.MockClock) -> None:
    async with running() as (connection, wire):
        stream = await accepted(connection, wire)

        async def expect(error: type[BaseException], call: Callable[[], Any]) -> None:
            with pytest.raises(error):
                await call()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, MuxedStreamReset, stream.read)
            nursery.start_soon(expect, MuxedStreamReset, lambda: stream.write(bytes(1 << 20)))
            nursery.start_soon(expect, MuxedConnUnavailable, connection.accept_stream)
            nursery.start_soon(expect, MuxedConnUnavailable, connection.ping)
            await settle()
            match how:
                case "goodbye":
                    wire.frame(GO_AWAY, 0, 0, 0)
                case "close":
                    await wire.close()
                case _:
                    await connection.close()
        assert connection.is_closed
        assert not connection.is_established
        await expect(MuxedConnUnavailable, connection.open_stream)
        await expect(MuxedConnUnavailable, connection.ping)
        await stream.reset()
        await connection.close()


async def test_a_stalled_connection_is_closed_all_the_same(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as (connection, wire):
        wire.stalled = True
        await connection.close()
        assert wire.closed


async def test_a_stream_whose_opening_was_cancelled_is_forgotten() -> None:
    async with running() as (connection, wire):
        wire.stalled = True
        with trio.move_on_after(0.01):
            await connection.open_stream()
        wire.stalled = False
        assert (await connection.open_stream()).stream_id == 3
        await settle()
        assert (WINDOW_UPDATE, RST, 1, 0, b"") in wire.taken()


async def test_stream_ids_run_out() -> None:
    async with running() as (connection, _):
        connection._next_id = (1 << 32) + 1  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(MuxedStreamError, match="used up"):
            await connection.open_stream()


async def test_a_lost_wire_is_a_lost_stream() -> None:
    async with running() as (connection, wire):
        stream = await connection.open_stream()
        wire.closed = True
        with pytest.raises(MuxedStreamReset, match="connection is gone"):
            await stream.write(b"x")
        stream.abort()
        await settle()  # the answer cannot be written either, quietly
        assert connection.get_remote_address() == stream.get_remote_address() == ("192.0.2.1", 4001)
        assert connection.get_transport_addresses() == []
        async with stream:
            with pytest.raises(NotImplementedError):
                stream.set_deadline(1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.builds(
            HEADER.pack,
            st.integers(0, 1),
            st.integers(0, 4),
            st.integers(0, 15),
            st.integers(0, 8),
            st.integers(0, 40),
        ),
        max_size=12,
    )
)
def test_garbage_never_raises(messages: list[bytes]) -> None:
    async def check() -> None:
        async with running() as (connection, wire):
            for message in messages:
                if not wire.closed:
                    wire.put(message)
                await settle()
            assert connection.is_closed == wire.closed

    trio.run(check)


class ThinWire(Wire):
    """A wire that takes so many bytes a second, and remembers when each frame was through."""

    def __init__(self, bytes_per_s: float) -> None:
        super().__init__(is_initiator=True)
        self.through: list[tuple[float, bytes]] = []
        self._bytes_per_s = bytes_per_s
        self._line = trio.Lock()

    async def write(self, data: bytes) -> None:
        async with self._line:
            took_s = len(data) / self._bytes_per_s
            await trio.sleep(took_s)
            self.raw.rate.note(len(data), took_s)
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
