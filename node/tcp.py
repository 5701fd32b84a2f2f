"""TCP that notices when the other side is gone, and sends small messages at once."""

from __future__ import annotations

import socket
from typing import Any

import trio
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from .addresses import parse_tcp
from .dial import innermost

READ_BYTES = 1 << 17
KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3


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


class TcpStream(TrioTCPStream):
    """A TCP connection read in large pieces, whose writers can be cancelled without harm.

    libp2p's own reads the length and the body of every Noise message from the socket separately, and a write
    cancelled half-way leaves the peer with half a message, after which it can decrypt nothing more.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self.closed = trio.Event()
        self._received = b""
        self._read = 0  # how much of it was handed out
        self._outbox = bytearray()
        self._taken = 0  # bytes ever put into the outbox
        self._sent = 0  # bytes ever sent from it
        self._sending = False
        self._progress = trio.lowlevel.ParkingLot()

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes; does not suspend while some are left of what was received before.

        Raises:
            ConnectionClosedError: The connection has ended.
        """
        if self._read == len(self._received):
            try:
                self._received = bytes(await self.stream.receive_some(READ_BYTES))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise ConnectionClosedError(f"the connection broke: {exc}", transport="tcp") from exc
            self._read = 0
            if not self._received:
                raise ConnectionClosedError("the peer closed the connection", transport="tcp")
        start = self._read
        self._read = len(self._received) if n is None else min(start + n, len(self._received))
        return self._received[start : self._read]

    async def write(self, data: bytes) -> None:
        """Send `data`, taking it before the first suspension: who writes first is sent first.

        A caller that is cancelled leaves its bytes behind, and the next one sends them.

        Raises:
            ConnectionClosedError: The connection has ended.
        """
        self._outbox += data
        self._taken += len(data)
        until = self._taken
        while self._sent < until:
            if self._sending:
                await self._progress.park()
            else:
                await self._send_some()

    async def _send_some(self) -> None:
        self._sending = True
        try:
            sent = await self.stream.socket.send(self._outbox)
        except (OSError, trio.ClosedResourceError) as exc:
            self.closed.set()
            raise ConnectionClosedError(f"the connection broke: {exc}", transport="tcp") from exc
        else:
            self._sent += sent
            del self._outbox[:sent]
        finally:
            self._sending = False
            self._progress.unpark_all()

    async def close(self) -> None:
        self.closed.set()
        await self.stream.aclose()


class TunedTCP(TCP):
    """libp2p's TCP transport, with every connection tuned and wrapped, dialled or accepted."""

    def __init__(self, user_timeout_s: float) -> None:
        super().__init__()
        self._user_timeout_s = user_timeout_s

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect to `/ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>`; libp2p's logs every refusal as an error."""
        _, host, port, _ = parse_tcp(str(maddr))
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError as exc:
            raise OpenConnectionError(innermost(exc)) from exc
        tune(stream, self._user_timeout_s)
        return RawConnection(TcpStream(stream), True)

    async def dial_with_source(self, maddr: Multiaddr, source: tuple[str, int]) -> IRawConnection:
        """Connect from a given local port, as hole punching needs."""
        connection: Any = await super().dial_with_source(maddr, source)
        tune(connection.stream.stream, self._user_timeout_s)
        return RawConnection(TcpStream(connection.stream.stream), True)

    def create_listener(self, handler_function: Any) -> Any:
        """A listener whose task for a connection ends with the connection.

        libp2p parks it until the host stops, together with one of the places for incoming connections: 250
        visitors later, whether they stayed or not, nobody is let in any more.
        """

        async def handle(accepted: Any) -> None:
            tune(accepted.stream, self._user_timeout_s)
            stream = TcpStream(accepted.stream)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when, stream.closed, nursery.cancel_scope)
                await handler_function(stream)
                nursery.cancel_scope.cancel()

        return super().create_listener(handle)


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
