"""The muxer against a peer made of bytes: what it sends, what it tolerates, what it does not."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.stream_muxer.exceptions import (
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)

from p2pinfer.node.transport import yamux
from p2pinfer.node.transport.yamux_frames import (
    ACK,
    DATA,
    FIN,
    HEADER,
    INITIAL_WINDOW,
    MAX_PAYLOAD,
    PING,
    RST,
    SMALL_BYTES,
    SYN,
    WINDOW_UPDATE,
)

from .wire import accepted, running, settle


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
