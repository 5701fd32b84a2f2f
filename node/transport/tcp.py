"""TCP connections that detect a dead peer and send small messages at once."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import trio
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from .address_race import innermost
from .addresses import parse_tcp
from .private_network import Guarded
from .raw_stream import RawStream

READ_BYTES = 1 << 17
KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3

A = TypeVar("A")
T = TypeVar("T")


def tune(stream: trio.SocketStream, user_timeout_s: float) -> None:
    """Make a connection fail within `user_timeout_s` once nothing comes back, idle or not.

    Without this a path that silently drops packets looks alive for a quarter of an hour.
    """
    set_option = stream.setsockopt
    set_option(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
        ("TCP_USER_TIMEOUT", int(user_timeout_s * 1000)),
    ):
        option = getattr(socket, name, None)  # macOS and Windows lack some
        if option is not None:
            set_option(socket.IPPROTO_TCP, option, value)


def share_port(sock: Any) -> None:
    """Let `sock` be bound to a port that a listener has; both must say so."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


class TcpStream(RawStream):
    """A TCP connection under Noise.

    It waits for the socket first and then reads, once. trio's stream reads first, which mostly fails, and
    lets others run when it does not: either way what has come would wait for one more turn of the event loop.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        """Takes the socket out of `stream`."""
        super().__init__()
        taken = stream.socket
        # Said rather than asked for: macOS no longer tells of a connection that is gone already.
        self.socket = socket.socket(taken.family, taken.type, taken.proto, taken.detach())
        self.socket.setblocking(False)
        self._remote = _name(self.socket.getpeername)
        self.local_port = (_name(self.socket.getsockname) or ("", None))[1]

    async def _receive(self) -> bytes:
        if self.socket.fileno() == -1:
            raise ConnectionClosedError("the connection is closed", transport="tcp")
        received: bytes | None = None
        try:
            while received is None:
                await trio.lowlevel.wait_readable(self.socket)
                received = _ready(self.socket.recv, READ_BYTES)
        except (OSError, trio.ClosedResourceError) as exc:
            raise ConnectionClosedError(f"the connection broke: {exc}", transport="tcp") from exc
        if not received:
            raise ConnectionClosedError("the peer closed the connection", transport="tcp")
        return received

    async def _send_some(self, outbox: bytearray) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            while (sent := _ready(self.socket.send, outbox)) is None:
                await trio.lowlevel.wait_writable(self.socket)
        except (OSError, trio.ClosedResourceError) as exc:
            self.closed.set()
            raise ConnectionClosedError(f"the connection broke: {exc}", transport="tcp") from exc
        del outbox[:sent]
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _send_now(self, outbox: bytearray) -> None:
        with suppress(OSError):  # it would block, or is broken, which the next `write` will see
            del outbox[: self.socket.send(outbox)]

    async def close(self) -> None:
        self.closed.set()
        if self.socket.fileno() != -1:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        await trio.lowlevel.checkpoint()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's address; libp2p's own stream has none for IPv6, whose socket names are longer."""
        return self._remote


def _ready(ask: Callable[[A], T], argument: A) -> T | None:
    """Result of a call on a socket that does not block; None if it would."""
    try:
        return ask(argument)
    except BlockingIOError:
        return None


def _name(ask: Callable[[], Any]) -> tuple[str, int] | None:
    try:
        name = ask()
    except OSError:  # it is gone already
        return None
    if isinstance(name, str | bytes):  # a pair of Unix sockets has no addresses
        return None
    return str(name[0]).removeprefix("::ffff:"), int(name[1])


class TunedTCP(TCP):
    """libp2p's TCP transport, with every connection tuned, guarded and wrapped, dialled or accepted.

    Args:
        key: That of the private swarm that every peer must be of.
        on_stranger: Called with the address of whoever connects and is not, and with how it showed.
        max_per_address: Connections accepted from one IP address at once.
    """

    def __init__(
        self,
        user_timeout_s: float,
        key: bytes | None = None,
        on_stranger: Callable[[str, str], None] = lambda address, why: None,
        max_per_address: int = 1 << 20,
    ) -> None:
        super().__init__()
        self._user_timeout_s = user_timeout_s
        self._key = key
        self._on_stranger = on_stranger
        self._max_per_address = max_per_address
        self._accepted = Counter[str]()  # connections by the IP address they come from

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect to `/ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>`; libp2p's logs every refusal as an error."""
        _, host, port, _ = parse_tcp(str(maddr))
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError as exc:
            raise OpenConnectionError(innermost(exc)) from exc
        tune(stream, self._user_timeout_s)
        return RawConnection(self._dialled(TcpStream(stream)), True)

    async def dial_with_source(self, maddr: Multiaddr, source: tuple[str, int]) -> IRawConnection:
        """Connect to an IP address from a given local one, as hole punching needs."""
        _, host, port, _ = parse_tcp(str(maddr))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with trio.socket.socket(family, socket.SOCK_STREAM) as connecting:
            try:
                share_port(connecting)
                await connecting.bind(source)
                await connecting.connect((host, port))
            except OSError as exc:
                raise OpenConnectionError(innermost(exc)) from exc
            stream = trio.SocketStream(connecting.dup())
        tune(stream, self._user_timeout_s)
        return RawConnection(self._dialled(TcpStream(stream)), True)

    def _dialled(self, stream: TcpStream) -> Guarded:
        return Guarded(stream, self._key, lambda address, why: None)  # who dials sees the error

    def guarded(self, stream: TcpStream) -> Guarded:
        """A connection that was accepted, which must begin as those of our swarm do."""
        return Guarded(stream, self._key, self._on_stranger)

    def create_listener(self, handler_function: Any) -> Any:
        """A listener whose task for a connection ends with the connection.

        libp2p parks it until the host stops, together with one of the places for incoming connections: 250
        visitors later, whether they stayed or not, nobody is let in any more.
        """

        async def handle(accepted: Any) -> None:
            tune(accepted.stream, self._user_timeout_s)
            stream = TcpStream(accepted.stream)
            guarded = self.guarded(stream)
            with self._counted(stream) as is_welcome:
                if not is_welcome:
                    await stream.close()
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_when, stream.closed, nursery.cancel_scope)
                    await handler_function(guarded)
                    nursery.cancel_scope.cancel()

        return super().create_listener(handle)

    @contextmanager
    def _counted(self, stream: TcpStream) -> Generator[bool]:
        """True if there is a place for another connection from where `stream` comes, which it then has."""
        remote = stream.get_remote_address()
        if remote is None:  # it is gone already
            yield False
            return
        address = remote[0]
        if self._accepted[address] >= self._max_per_address:
            self._on_stranger(address, f"it has {self._max_per_address} connections already")
            yield False
            return
        self._accepted[address] += 1
        try:
            yield True
        finally:
            self._accepted[address] -= 1
            if not self._accepted[address]:
                del self._accepted[address]


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
