"""TCP connections that detect a dead peer and send small messages at once."""

from __future__ import annotations

import math
import socket
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import trio
from libp2p.abc import IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from p2pinfer.node.concurrency.loop_share import LoopShares, Overspent, clocked
from p2pinfer.node.concurrency.nurseries import innermost

from .addresses import line_of, parse_tcp, range_of
from .line_rate import MAX_RTT_S, Uplink, is_local
from .losses import Losses
from .private_network import Guarded
from .raw_stream import RawStream

if sys.platform != "win32":
    import fcntl
    import termios

READ_BYTES = 1 << 17
KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3
THIN_TIMEOUT_S = 15.0  # without an acknowledgement, before a connection over such a line is dead
ROUND_TRIPS = 6  # without an acknowledgement, before a connection of long round trips is dead
FIRST_UNSENT_BYTES = 32 << 10  # that the kernel takes ahead of the line, while its rate is not known
UNSENT_S = 0.1  # what it takes ahead afterwards, in time
MIN_UNSENT_BYTES, MAX_UNSENT_BYTES = 8 << 10, 256 << 10

# Called in the task that dials, with the seconds that its connection took: libp2p's swarm lies between the
# two.
on_round_trip: ContextVar[Callable[[float], None] | None] = ContextVar("on_round_trip", default=None)


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
        # Else the kernel takes megabytes, and what is urgent waits behind them: on a line of 30 KB/s, a
        # minute.
        ("TCP_NOTSENT_LOWAT", FIRST_UNSENT_BYTES),
    ):
        _set_tcp(stream, name, value)


def _set_tcp(sock: Any, name: str, value: int) -> None:
    option = getattr(socket, name, None)  # macOS and Windows lack some
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


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

    def __init__(
        self, stream: trio.SocketStream, user_timeout_s: float = math.inf, uplink: Uplink | None = None
    ) -> None:
        """Takes the socket out of `stream`, which was tuned with the same `user_timeout_s`."""
        super().__init__()
        self._user_timeout_s = user_timeout_s
        self._uplink = uplink or Uplink()
        self._uplink.add(self)
        self._timeout_ms = 0  # as it was set for the round trips
        self._unsent_bytes = FIRST_UNSENT_BYTES
        taken = stream.socket
        # Said rather than asked for: macOS no longer tells of a connection that is gone already.
        self.socket = socket.socket(taken.family, taken.type, taken.proto, taken.detach())
        self.socket.setblocking(False)
        self._losses = Losses(self.socket)
        self._remote = _name(self.socket.getpeername)
        self.local_ip, self.local_port = _name(self.socket.getsockname) or ("", None)

    async def _receive(self) -> bytes:
        if self.socket.fileno() == -1:
            raise ConnectionClosedError("the connection is closed", transport="tcp")
        received: bytes | None = None
        try:
            while received is None:
                await trio.lowlevel.wait_readable(self.socket)
                with suppress(BlockingIOError):
                    received = self.socket.recv(READ_BYTES)
        except (OSError, trio.ClosedResourceError) as exc:
            raise ConnectionClosedError(f"the connection broke: {exc}", transport="tcp") from exc
        if not received:
            raise ConnectionClosedError("the peer closed the connection", transport="tcp")
        return received

    async def _send_some(self, outbox: bytearray) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        sent: int | None = None
        offered_at = trio.current_time()
        has_waited = False
        try:
            while sent is None:
                try:
                    sent = self.socket.send(outbox)
                except BlockingIOError:
                    has_waited = True
                    await trio.lowlevel.wait_writable(self.socket)
        except (OSError, trio.ClosedResourceError) as exc:
            self.closed.set()
            raise ConnectionClosedError(f"the connection broke: {exc}", transport="tcp") from exc
        del outbox[:sent]
        self.rate.note(sent, offered_at, trio.current_time() if has_waited else offered_at)
        if has_waited:
            self._uplink.note(self.rate.bytes_per_s)
            self._limit_unsent()
            self._losses.look(self.least_rtt_s)
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def until_crowded(self) -> None:
        await self._uplink.until_crowded()

    @property
    def queued_bytes(self) -> int:
        return len(self._outbox) + _unacknowledged(self.socket)

    def expect_round_trip(self, rtt_s: float, latest_s: float = 0.0) -> None:
        super().expect_round_trip(rtt_s, latest_s)
        if self._user_timeout_s == math.inf or self.socket.fileno() == -1:
            return
        least_s = max(self._user_timeout_s, THIN_TIMEOUT_S if self._uplink.is_thin else 0.0)
        timeout_ms = int(1000 * max(least_s, ROUND_TRIPS * min(rtt_s, MAX_RTT_S)))
        is_worth_it = not 0.8 * timeout_ms <= self._timeout_ms <= 1.2 * timeout_ms
        self._limit_unsent()
        if is_worth_it:
            self._timeout_ms = timeout_ms
            _set_tcp(self.socket, "TCP_USER_TIMEOUT", timeout_ms)

    def _limit_unsent(self) -> None:
        """Let the kernel take about `UNSENT_S` ahead of the line, or a round trip."""
        rate = self.rate.bytes_per_s
        if self._user_timeout_s == math.inf:
            return  # it was not tuned, and may be no TCP
        if is_local(rate, self.least_rtt_s):
            wanted = MAX_UNSENT_BYTES
        elif rate:
            # Over a long way acknowledgements come once a round trip, together. TCP's window grows with what
            # it then has to send, and not where it has to wait for us.
            ahead_s = max(UNSENT_S, self.least_rtt_s)
            wanted = min(max(int(rate * ahead_s), MIN_UNSENT_BYTES), MAX_UNSENT_BYTES)
        else:
            wanted = FIRST_UNSENT_BYTES
        if not self._unsent_bytes / 2 < wanted < self._unsent_bytes * 2:
            self._unsent_bytes = wanted
            _set_tcp(self.socket, "TCP_NOTSENT_LOWAT", wanted)

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


def _unacknowledged(sock: socket.socket) -> int:
    """Bytes that the kernel has taken and the other end has not acknowledged; 0 where that is not told."""
    if sys.platform == "win32" or sock.fileno() == -1:
        return 0
    try:  # SIOCOUTQ, which has the number of TIOCOUTQ
        answer: bytes = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:  # not Linux
        return 0
    return int.from_bytes(answer, sys.byteorder)


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
        max_per_address: Connections accepted at once from one line, as `line_of` has it; a range of lines may
            have twice as many.
        shares: Counts what handshakes take of the event loop.
        first_word_s: How long who connects may say nothing.
    """

    def __init__(
        self,
        user_timeout_s: float,
        key: bytes | None = None,
        on_stranger: Callable[[str, str], None] = lambda address, why: None,
        max_per_address: int = 1 << 20,
        shares: LoopShares | None = None,
        first_word_s: float = math.inf,
    ) -> None:
        super().__init__()
        self._first_word_s = first_word_s
        self._uplink = Uplink()
        self._user_timeout_s = user_timeout_s
        self._key = key
        self._on_stranger = on_stranger
        self._max_per_address = max_per_address
        self._shares = shares or LoopShares()
        self._accepted = Counter[str]()  # connections by the addresses that count together

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """Connect to `/ip4|ip6|dns|dns4|dns6/<host>/tcp/<port>`; libp2p's logs every refusal as an error."""
        _, host, port, _ = parse_tcp(str(maddr))
        began_at = trio.current_time()
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError as exc:
            raise OpenConnectionError(innermost(exc)) from exc
        tune(stream, self._user_timeout_s)
        return RawConnection(self._dialled(stream, trio.current_time() - began_at), True)

    async def dial_with_source(self, maddr: Multiaddr, source: tuple[str, int]) -> IRawConnection:
        """Connect to an IP address from a given local one, as hole punching needs."""
        _, host, port, _ = parse_tcp(str(maddr))
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        began_at = trio.current_time()
        with trio.socket.socket(family, socket.SOCK_STREAM) as connecting:
            try:
                share_port(connecting)
                await connecting.bind(source)
                await connecting.connect((host, port))
            except OSError as exc:
                raise OpenConnectionError(innermost(exc)) from exc
            stream = trio.SocketStream(connecting.dup())
        tune(stream, self._user_timeout_s)
        return RawConnection(self._dialled(stream, trio.current_time() - began_at), True)

    def _dialled(self, socket_stream: trio.SocketStream, took_s: float) -> Guarded:
        """A connection that took so long to make, which is the first that is known of its round trip."""
        stream = TcpStream(socket_stream, self._user_timeout_s, self._uplink)
        stream.expect_round_trip(took_s)
        if (heard := on_round_trip.get()) is not None:
            heard(took_s)
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
            stream = TcpStream(accepted.stream, self._user_timeout_s, self._uplink)
            guarded = self.guarded(stream)
            with self._counted(stream) as is_welcome:
                if not is_welcome:
                    await stream.close()
                    return
                # A handshake costs as much as a hundred messages, and nobody knows yet who makes it.
                remote = stream.get_remote_address()
                meter = self._shares.meter("", range_of(remote[0]) if remote else "")
                try:
                    await meter.pause()
                except Overspent:
                    await stream.close()
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_when, stream.closed, nursery.cancel_scope)
                    nursery.start_soon(_drop_if_silent, stream, self._first_word_s)
                    await clocked(handler_function(guarded), meter.spend)
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
        # A line that has many addresses has no more connections for it, and a whole range twice as many.
        places = {line_of(address): self._max_per_address, range_of(address): 2 * self._max_per_address}
        for prefix, most in places.items():
            if self._accepted[prefix] >= most:
                who = "it" if prefix.startswith(f"{address}/") else prefix
                self._on_stranger(address, f"{who} has {most} connections already")
                yield False
                return
        self._accepted.update(places.keys())
        try:
            yield True
        finally:
            for prefix in places:
                self._accepted[prefix] -= 1
                if not self._accepted[prefix]:
                    del self._accepted[prefix]


async def _drop_if_silent(stream: TcpStream, within_s: float) -> None:
    await trio.sleep(within_s)
    if not stream.has_heard:
        await stream.close()


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
