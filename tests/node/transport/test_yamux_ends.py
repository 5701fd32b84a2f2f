"""The muxer's limits, its measurements, and how its streams and connections end."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamError,
    MuxedStreamReset,
)

from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.transport.connection_gate import GATED, RATE_LIMITED, RESOURCE_LIMIT_EXCEEDED, Gate
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.transport.yamux_frames import (
    ACK,
    DATA,
    FRAMES_AT_ONCE,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    PING,
    RST,
    SMALL_BYTES,
    SYN,
    WINDOW_UPDATE,
)
from p2pinfer.node.transport.yamux_stream import StreamRefused

from .wire import Wire, accepted, running, settle


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


async def test_whatever_comes_is_a_sign_of_life(autojump_clock: trio.testing.MockClock) -> None:
    """The answer to a ping is behind a prompt that takes the peer's line a minute; then nothing comes."""
    async with running() as (connection, wire):
        found: list[tuple[bool, float]] = []

        async def ask() -> None:
            found.append((await connection.is_answered(1.5), trio.current_time()))

        stream = await connection.open_stream()
        began_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            for _ in range(60):
                await trio.sleep(1.0)
                wire.frame(DATA, 0, stream.stream_id, 4, b"text")
            assert not found
        ((answered, at),) = found
        assert not answered
        assert at == pytest.approx(began_at + 61.5)


async def test_a_peer_that_answers_at_last_is_alive(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as (connection, wire):
        found: list[bool] = []

        async def ask() -> None:
            found.append(await connection.is_answered(1.5))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(1.0)
            wire.frame(PING, ACK, 0, 12345)  # to nothing we asked
            await trio.sleep(1.0)
            (*_, nonce) = [
                nonce
                for _, kind, flags, _, nonce in (HEADER.unpack_from(frame) for frame in wire.sent)
                if (kind, flags) == (PING, SYN)
            ]
            wire.frame(PING, ACK, 0, nonce)
        assert found == [True]
    assert not await connection.is_answered(1.5)  # it is gone


async def test_a_host_whose_thin_line_is_full_pings_every_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its router drops acknowledgements, and a peer that misses them for 5 s hangs up."""
    pings = 0

    async def answer(wire: Wire) -> None:
        nonlocal pings
        while True:
            await trio.sleep(0.1)
            for _, kind, flags, _, nonce in (HEADER.unpack_from(frame) for frame in wire.sent):
                if (kind, flags) == (PING, SYN):
                    pings += 1
                    wire.frame(PING, ACK, 0, nonce)
            wire.sent.clear()

    async with running() as (_, wire), trio.open_nursery() as nursery:
        nursery.start_soon(answer, wire)
        await trio.sleep(59.0)
        assert pings == 2
        for _ in range(20):
            wire.raw.uplink.note(30_000.0)
            await trio.sleep(1.0)
        assert 15 <= pings <= 25
        wire.raw.uplink.note(3e6)  # a fast one
        await trio.sleep(29.0)
        assert pings <= 30
        nursery.cancel_scope.cancel()


async def test_a_message_of_very_many_frames_lets_others_run_meanwhile() -> None:
    turns = 0

    async def run_beside() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with running() as (_, wire), trio.open_nursery() as nursery:
        nursery.start_soon(run_beside)
        wire.put(b"".join(HEADER.pack(0, PING, SYN, 0, number) for number in range(4000)))
        answered, asked_at = 0, turns
        while answered < 4000:
            await trio.lowlevel.checkpoint()
            answered += len(wire.taken())
        assert turns - asked_at >= 4000 // (2 * FRAMES_AT_ONCE)
        nursery.cancel_scope.cancel()


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
        for _ in range(2):
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
