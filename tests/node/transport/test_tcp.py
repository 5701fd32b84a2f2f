"""TCP connections: how they are tuned, read in pieces, written by several, and lost."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncGenerator
from contextlib import ExitStack, suppress
from typing import Any, cast

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.transport.exceptions import OpenConnectionError
from multiaddr import Multiaddr

from p2pinfer.node.transport.private_network import GREETING, Guarded
from p2pinfer.node.transport.tcp import TcpStream, TunedTCP, tune

Pair = tuple[TcpStream, trio.SocketStream]


@pytest.fixture
async def pair() -> AsyncGenerator[Pair]:
    """A stream of ours, and the socket at the other end."""
    ours, theirs = trio.socket.socketpair()
    stream, other = TcpStream(trio.SocketStream(ours)), trio.SocketStream(theirs)
    with trio.fail_after(60):
        yield stream, other
    await stream.close()
    await other.aclose()


async def test_small_messages_go_out_at_once_and_a_dead_path_is_noticed() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    stream = await trio.testing.open_stream_to_socket_listener(listener)
    tune(stream, user_timeout_s=7.0)
    sock = stream.socket
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
    await stream.aclose()
    await listener.aclose()


async def test_a_system_without_some_options_is_tuned_by_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    await test_both_ends_of_a_dialled_connection_are_tuned()


async def test_both_ends_of_a_dialled_connection_are_tuned() -> None:
    transport = TunedTCP(10.0)
    accepted, arrived = trio.open_memory_channel[Guarded](1)

    async def handle(stream: Guarded) -> None:
        await accepted.send(stream)
        assert isinstance(stream.inner, TcpStream)
        await stream.inner.closed.wait()
        await trio.sleep_forever()  # as libp2p does

    listener = transport.create_listener(handle)
    with trio.fail_after(60):
        await listener.listen(Multiaddr("/ip4/127.0.0.1/tcp/0"))
        address = listener.get_addrs()[0]
        for connection in (
            await transport.dial(address),
            await transport.dial_with_source(address, ("127.0.0.1", 0)),
        ):
            ours: Any = connection
            theirs = await arrived.receive()
            for stream in (ours.stream.inner, theirs.inner):
                assert isinstance(stream, TcpStream)
                assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            await ours.write(GREETING)
            assert await theirs.read(len(GREETING)) == GREETING
            await ours.close()
            with pytest.raises(ConnectionClosedError, match="closed"):
                await theirs.read(1)
            await theirs.close()
        await listener.close()


async def test_a_refused_connection_is_an_error_with_a_reason_and_no_noise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(OpenConnectionError, match="refused"):
        await TunedTCP(10.0).dial(Multiaddr("/ip4/127.0.0.1/tcp/1"))
    assert caplog.records == []


async def test_a_host_name_is_dialled() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    connection = await TunedTCP(10.0).dial(Multiaddr(f"/dns4/localhost/tcp/{port}"))
    await connection.close()
    await listener.aclose()


class Gone(socket.socket):
    """Knows no names and no family, as on macOS after the peer has reset the connection."""

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        if family == -1 and fileno is not None:
            raise OSError(errno.EINVAL, "Invalid argument")
        super().__init__(family, type, proto, fileno)

    def getpeername(self) -> Any:
        raise OSError(errno.EINVAL, "Invalid argument")

    getsockname = getpeername


async def test_a_connection_that_is_gone_already_can_still_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = trio.socket.socketpair()
    with monkeypatch.context() as patched:
        patched.setattr(socket, "socket", Gone)
        stream = TcpStream(trio.SocketStream(ours))
    assert stream.get_remote_address() is None
    await stream.close()
    assert await theirs.recv(1) == b""
    theirs.close()


async def test_what_came_in_one_piece_is_handed_out_in_any(pair: Pair) -> None:
    ours, theirs = pair
    await theirs.send_all(b"abcdefgh")
    assert await ours.read(2) == b"ab"
    assert await ours.read(0) == b""
    assert await ours.read(3) == b"cde"
    assert await ours.read() == b"fgh"


async def test_writers_are_served_in_the_order_they_came(pair: Pair) -> None:
    ours, theirs = pair
    size = 1 << 20
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(ours.write, bytes([number]) * size)
            await trio.testing.wait_all_tasks_blocked()
        received = b""
        while len(received) < 4 * size:
            received += await theirs.receive_some()
    assert received == b"".join(bytes([number]) * size for number in range(4))


async def test_a_cancelled_write_is_finished_by_the_next(pair: Pair) -> None:
    ours, theirs = pair
    size = 4 << 20
    with trio.move_on_after(0.01):
        await ours.write(b"a" * size)
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.write, b"b")
        while len(received) < size + 1:
            received += await theirs.receive_some()
    assert received == b"a" * size + b"b"


async def test_a_cancelled_writer_hands_over_to_one_who_waits(pair: Pair) -> None:
    ours, theirs = pair
    size = 4 << 20
    first = trio.CancelScope()

    async def write_first() -> None:
        with first:
            await ours.write(b"a" * size)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_first)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.start_soon(ours.write, b"b")
        await trio.testing.wait_all_tasks_blocked(0.01)
        first.cancel()
        received = b""
        while len(received) < size + 1:
            received += await theirs.receive_some()


async def test_a_lost_connection_is_an_error_for_reader_and_writer(pair: Pair) -> None:
    ours, theirs = pair
    await theirs.aclose()
    with pytest.raises(ConnectionClosedError):
        await ours.read(1)
    with pytest.raises(ConnectionClosedError):
        await ours.write(b"x")
    await ours.close()
    with pytest.raises(ConnectionClosedError):
        await ours.read(1)
    with pytest.raises(ConnectionClosedError):
        await ours.write(b"x")
    assert ours.closed.is_set()


async def test_what_is_written_at_once_goes_out_without_a_suspension(pair: Pair) -> None:
    ours, theirs = pair
    assert ours.write_now(b"first ")
    assert ours.is_clear
    await ours.write(b"second")
    received = b""
    while len(received) < 12:
        received += await theirs.receive_some()
    assert received == b"first second"


async def test_what_the_socket_does_not_take_goes_out_with_the_next_write(pair: Pair) -> None:
    ours, theirs = pair
    size = 8 << 20
    assert ours.write_now(b"a" * size)
    assert not ours.is_clear
    assert not ours.write_now(b"never")
    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.write, b"")
        while len(received) < size:
            received += await theirs.receive_some()
    assert received == b"a" * size
    assert ours.is_clear


async def test_a_broken_connection_is_found_out_by_the_next_write(pair: Pair) -> None:
    ours, _ = pair
    await ours.close()
    assert ours.write_now(b"x")
    with pytest.raises(ConnectionClosedError):
        await ours.write(b"y")


async def test_writes_to_a_lost_connection_let_others_run_and_keep_nothing(pair: Pair) -> None:
    """Or a caller that tries again would stop the whole process, and fill its memory."""
    ours, theirs = pair
    await theirs.aclose()
    while not ours.closed.is_set():
        with suppress(ConnectionClosedError):
            await ours.write(b"x")
        await trio.sleep(0)
    inside: Any = ours
    kept = len(inside._outbox)
    ran = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(set_later, ran)
        for _ in range(3):
            with pytest.raises(ConnectionClosedError):
                await ours.write(b"x" * 1000)
        assert ran.is_set()
    assert len(inside._outbox) == kept


async def set_later(event: trio.Event) -> None:
    await trio.lowlevel.checkpoint()
    event.set()


@pytest.mark.parametrize(
    ("one_line", "same_range", "elsewhere"),
    [
        (
            ["2001:db8:1::1", "2001:db8:1:0:ff::2"],
            ["2001:db8:1:ff00::1", "2001:db8:1:ee00::1"],
            "2001:db8:2::1",
        ),
        (["11.0.0.1", "11.0.0.1"], ["11.0.0.2", "11.0.0.3"], "11.0.1.1"),
    ],
)
def test_all_addresses_of_one_customer_share_its_connections(
    one_line: list[str], same_range: list[str], elsewhere: str
) -> None:
    """An IPv6 customer has 2^64 addresses or more, and takes no more places for it."""

    class From:
        def __init__(self, address: str) -> None:
            self.address = address

        def get_remote_address(self) -> tuple[str, int]:
            return self.address, 4001

    refused = list[str]()
    transport = TunedTCP(1.0, on_stranger=lambda address, why: refused.append(address), max_per_address=2)
    with ExitStack() as stack:

        def comes(address: str) -> bool:
            counted = transport._counted(cast(TcpStream, From(address)))  # pyright: ignore[reportPrivateUsage]
            return stack.enter_context(counted)

        assert [comes(address) for address in one_line] == [True, True]
        assert not comes(one_line[1])
        assert [comes(address) for address in same_range] == [True, True]
        assert not comes(same_range[0])
        assert comes(elsewhere)
        assert refused == [one_line[1], same_range[0]]
    with ExitStack() as stack:
        assert comes(one_line[0])  # all of them have left
