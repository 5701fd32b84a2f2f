"""Losses that say nothing about a line, and the congestion control that does not mind them."""

from __future__ import annotations

import errno
import logging
import socket
import struct
import sys
from collections.abc import Generator
from typing import Any, cast

import pytest
import trio
import trio.testing

from p2pinfer.node.transport import losses
from p2pinfer.node.transport.losses import CONTROL, LOOK_EVERY_S, Losses, has_room, is_lossy

linux = pytest.mark.skipif(sys.platform != "linux", reason="no other system has this choice")


@pytest.mark.parametrize(
    ("rtt_s", "least_rtt_s", "room"),
    [
        (0.11, 0.1, True),
        (0.11, 0.0, False),  # nobody knows if there is a queue
        (0.3, 0.1, False),  # there is one
        (0.02, 0.001, False),
        (0.008, 0.001, True),  # next door, busy processors make it so long
    ],
)
def test_a_queue_shows_in_round_trips(rtt_s: float, least_rtt_s: float, room: bool) -> None:
    assert has_room(rtt_s, least_rtt_s) is room


@pytest.mark.parametrize(
    ("sent", "again", "lossy"),
    [
        (1000, 50, True),
        (1000, 9, False),  # so few cost little
        (1000, 10, True),
        (63, 20, False),  # too few to tell
        (64, 2, False),
        (64, 3, True),
        (0, 0, False),
    ],
)
def test_losses_that_hold_a_connection_back(sent: int, again: int, lossy: bool) -> None:
    assert is_lossy(sent, again) is lossy


class Sock:
    """A socket of Linux that has sent 1,000 segments, 50 of them twice, with round trips of 0.11 s."""

    def __init__(self, size: int = 232, refuses: int = 0) -> None:
        self.size, self.refuses = size, refuses
        self.rtt_s, self.sent, self.again = 0.11, 1000, 50
        self.asked: list[bytes] = []
        self.looks = 0

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        self.looks += 1
        info = bytearray(256)
        for at, value in ((68, int(self.rtt_s * 1e6)), (100, self.again), (156, self.sent)):
            struct.pack_into("=I", info, at, value)
        return bytes(info[: min(size, self.size)])

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        self.asked.append(value)
        if self.refuses:
            raise OSError(self.refuses, "Operation not permitted")


@pytest.fixture
def at() -> Generator[trio.testing.MockClock]:
    """A clock that moves when told."""
    yield trio.testing.MockClock()


def _looked(sock: Any, clock: trio.testing.MockClock, least_rtt_s: float = 0.1) -> None:
    async def look() -> None:
        losing = Losses(sock)
        for _ in range(5):
            losing.look(least_rtt_s)
            losing.look(least_rtt_s)
            clock.jump(LOOK_EVERY_S)

    trio.run(look, clock=clock)


@linux
def test_a_lossy_connection_is_changed_once(at: trio.testing.MockClock) -> None:
    sock = Sock()
    _looked(sock, at)
    assert sock.asked == [CONTROL.encode()]


@linux
def test_losses_of_a_full_line_are_forgotten_when_it_has_room_again(at: trio.testing.MockClock) -> None:
    sock = Sock()

    async def send() -> None:
        losing = Losses(cast(Any, sock))
        for sock.rtt_s, sent, again in (
            (0.11, 30, 0),
            (0.3, 100, 50),
            (0.11, 1000, 1),
            (0.11, 1000, 1),
            (0.3, 100, 50),
            (0.11, 63, 5),
        ):
            sock.sent += sent
            sock.again += again
            losing.look(0.1)
            at.jump(LOOK_EVERY_S)
        assert sock.asked == []
        sock.sent += 1
        losing.look(0.1)

    sock.sent = sock.again = 0
    trio.run(send, clock=at)
    assert sock.asked == [CONTROL.encode()]


@linux
def test_looks_are_few(at: trio.testing.MockClock) -> None:
    sock = Sock()
    _looked(sock, at, least_rtt_s=0.05)
    assert sock.asked == []
    assert sock.looks == 5


@linux
def test_a_system_that_lends_no_other_control_is_asked_once_and_named(
    at: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    sock = Sock(refuses=errno.EPERM)
    with caplog.at_level(logging.INFO, losses.__name__):
        _looked(sock, at)
    assert len(sock.asked) == 1
    assert "5.0 % of its packets" in caplog.text
    assert "tcp_allowed_congestion_control" in caplog.text


@linux
def test_an_old_kernel_tells_too_little(at: trio.testing.MockClock) -> None:
    sock = Sock(size=148)
    _looked(sock, at)
    assert (sock.looks, sock.asked) == (1, [])


def test_a_system_without_the_choice_is_not_asked(
    at: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "TCP_CONGESTION", raising=False)
    sock = Sock()
    _looked(sock, at)
    assert (sock.looks, sock.asked) == (0, [])


def test_what_is_no_tcp_is_left_alone(at: trio.testing.MockClock) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _looked(ours, at)


@linux
async def test_a_real_connection_is_changed_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel lends it; where not, the connection goes on as it was."""
    told: list[tuple[float, ...]] = []

    def noted(*counted: float) -> bool:
        told.append(counted)
        return True

    monkeypatch.setattr(losses, "has_room", noted)
    monkeypatch.setattr(losses, "is_lossy", noted)
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    stream = await trio.testing.open_stream_to_socket_listener(listener)
    accepted = await listener.accept()
    with trio.fail_after(60):
        await stream.send_all(bytes(1000))
        assert len(await accepted.receive_some(1000)) == 1000
        before = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        Losses(cast(Any, stream.socket)).look(0.1)
        after = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert after.rstrip(b"\0") == CONTROL.encode() or after == before
        await stream.send_all(bytes(1000))
        assert await accepted.receive_some(1000)
    (rtt_s, least_rtt_s), (sent, again) = told
    assert (sent, again, least_rtt_s) == (1, 0, 0.1)
    assert 0 < rtt_s < 60
    for each in (stream, accepted, listener):
        await each.aclose()
