"""HTTP/1.1 server on trio: h11 speaks the protocol, and this bounds time and memory.

One task serves a connection, request after request. While a request is answered, a second task reads on, so
that a client that hangs up is noticed at once, also while nothing is being sent: the handler is then
cancelled, and with it whatever it generates. A client that closes only its sending side counts as gone: it
cannot be told from one that hung up.

An answer that breaks off is cut without the last chunk of its body, so no client takes it for whole.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Final, TypeAlias

import h11
import trio
from trio.abc import HalfCloseableStream

from p2pinfer.errors import AddressUnusable
from p2pinfer.node.concurrency.nurseries import open_nursery, outlasting

from .config import ApiConfig

logger = logging.getLogger(__name__)

Headers: TypeAlias = Sequence[tuple[str, str]]

BACKLOG: Final = 2048  # with 100, the slowest of 200 clients that came at once waited for seconds
_READ_BYTES: Final = 1 << 16
_HEAD_BYTES: Final = 1 << 14
_AHEAD_BYTES: Final = 1 << 16  # sent by a client that has no answer yet
_LINGER_S: Final = 2.0
_LINGER_BYTES: Final = 64 << 20
_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)


class BadBody(Exception):
    """A request's body is too long, too slow, or no HTTP. `status` is what HTTP calls that."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Gone(Exception):
    """The client hung up, speaks no HTTP, or takes nothing. A handler lets it pass."""


@dataclass(frozen=True, slots=True)
class Request:
    """Head of a request, and a way to its body.

    Attributes:
        path: Without the query.
        query: What is behind the question mark, as it came.
        headers: Names in lower case; values of those that occur twice are joined by commas.
        read: Gives the whole body; raises `BadBody`. To be called once.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    read: Callable[[], Awaitable[bytes]]


class Reply:
    """Answer to one request: whole at once, or begun, sent in pieces and ended."""

    def __init__(self, send: Callable[[h11.Event], Awaitable[None]], *, has_body: bool) -> None:
        self._send = send
        self._has_body = has_body  # False for HEAD
        self.is_begun = False
        self.is_ended = False

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send an answer whose length is known."""
        await self.begin(status, [*headers, ("Content-Length", str(len(body)))])
        if body:
            await self.send(body)
        await self.end()

    async def begin(self, status: int, headers: Headers) -> None:
        """Send the head; a body without Content-Length is sent in chunks."""
        self.is_begun = True
        reason = HTTPStatus(status).phrase
        await self._send(h11.Response(status_code=status, reason=reason, headers=list(headers)))

    async def send(self, piece: bytes) -> None:
        """Send a piece of the body."""
        if self._has_body:
            await self._send(h11.Data(data=piece))

    async def end(self, trailers: Headers = ()) -> None:
        """End the body; trailers go behind one that is sent in chunks."""
        self.is_ended = True
        await self._send(h11.EndOfMessage(headers=list(trailers)))


Handler: TypeAlias = Callable[[Request, Reply], Awaitable[None]]


async def serve_http(
    handle: Handler,
    config: ApiConfig,
    *,
    task_status: trio.TaskStatus[list[tuple[str, int]]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; then no connection is accepted, and answers have `drain_s` to end.

    Args:
        handle: Answers a request. What it raises is logged, and the connection is closed.
        task_status: Told the addresses that are listened on.

    Raises:
        AddressUnusable: The address is taken, or not of this machine.
    """
    try:
        listeners = await trio.open_tcp_listeners(config.port, host=config.host, backlog=BACKLOG)
    except OSError as exc:
        reason = exc.strerror or exc
        raise AddressUnusable(
            f"cannot listen on {config.host} port {config.port}: {reason}; choose another --port or --host"
        ) from exc
    server = HttpServer(handle, config)
    task_status.started([listener.socket.getsockname()[:2] for listener in listeners])
    async with outlasting(open_nursery()) as connections:
        try:
            await trio.serve_listeners(server.serve, listeners, handler_nursery=connections)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + config.drain_s):
                await server.drain()


class HttpServer:
    """Connections of a server, and the answers that go over them."""

    def __init__(self, handle: Handler, config: ApiConfig) -> None:
        self._handle = handle
        self._config = config
        self._connections: set[_Connection] = set()
        self._changed = trio.Event()

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Serve one connection; whatever goes wrong on it stays there."""
        if len(self._connections) >= self._config.max_connections:
            with trio.move_on_after(1):
                await _close(stream, _FULL)
            return
        connection = _Connection(stream, self._handle, self._config)
        self._connections.add(connection)
        try:
            await connection.serve()
        except Exception:
            logger.exception("an HTTP connection failed")
        finally:
            self._connections.discard(connection)
            self._changed.set()
            await _close(stream)

    async def drain(self) -> None:
        """Close what is idle, and wait until the rest has been answered."""
        for connection in tuple(self._connections):
            connection.leave()
        while self._connections:
            self._changed = trio.Event()
            await self._changed.wait()


class _Connection:
    """One connection: requests one after the other."""

    def __init__(self, stream: HalfCloseableStream, handle: Handler, config: ApiConfig) -> None:
        self._stream = stream
        self._handle = handle
        self._config = config
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        self._idle: trio.CancelScope | None = None  # while a request is waited for
        self._leaving = False

    def leave(self) -> None:
        """Take no further request."""
        self._leaving = True
        if self._idle is not None:
            self._idle.cancel()

    async def serve(self) -> None:
        """Answer requests until the client or the server has enough."""
        try:
            while not self._leaving and (request := await self._next_request()):
                await self._answer(request)
                if self._h11.their_state is h11.SEND_BODY:
                    return await self._linger()
                if self._h11.our_state is not h11.DONE:
                    return None
                self._h11.start_next_cycle()
        except Gone:
            pass
        except h11.RemoteProtocolError as exc:
            await self._refuse(exc)
            await self._linger()

    async def _next_request(self) -> h11.Request | None:
        """The head of the next request; None if none comes."""
        with trio.CancelScope(deadline=trio.current_time() + self._config.idle_timeout_s) as self._idle:
            while not self._h11.trailing_data[0]:
                if not await self._receive():
                    return None
        if self._idle.cancelled_caught:
            return None
        self._idle = None
        with trio.move_on_after(self._config.head_timeout_s):
            event = await self._next_event()
            return event if isinstance(event, h11.Request) else None
        raise h11.RemoteProtocolError("the head of the request came too slowly", error_status_hint=408)

    async def _answer(self, head: h11.Request) -> None:
        """Have the request handled; raises `Gone` if the client hangs up meanwhile."""
        read_all = trio.Event()
        read: Callable[[], Awaitable[bytes]] = partial(self._read_body, read_all)
        if not _has_body(head):
            await read()  # its end, which is there already
            read = _no_body
        path, _, query = head.target.decode("ascii").partition("?")
        request = Request(head.method.decode("ascii"), path, query, _joined(head), read)
        reply = Reply(self._send, has_body=head.method != b"HEAD")
        gone = True
        async with open_nursery() as nursery:
            nursery.start_soon(self._watch, read_all, nursery.cancel_scope)
            try:
                await self._handle(request, reply)
                gone = not reply.is_ended
            except Gone:
                pass
        if gone:
            raise Gone

    async def _watch(self, read_all: trio.Event, answering: trio.CancelScope) -> None:
        """Read on while the request is answered, and stop that when the client hangs up."""
        await read_all.wait()
        ahead = 0
        while ahead <= _AHEAD_BYTES:
            if not (count := await self._receive()):
                break
            ahead += count
        answering.cancel()

    async def _read_body(self, read_all: trio.Event) -> bytes:
        body, most = bytearray(), self._config.max_body_bytes
        with trio.move_on_after(self._config.body_timeout_s):
            try:
                while isinstance(event := await self._next_event(), h11.Data):
                    body += event.data
                    if len(body) > most:
                        raise BadBody(f"the request is longer than {most >> 10:,} KiB; shorten it", 413)
            except h11.RemoteProtocolError as exc:
                raise BadBody(f"the body of the request is not HTTP: {exc}", 400) from exc
            if not isinstance(event, h11.EndOfMessage):
                raise Gone
            read_all.set()
            return bytes(body)
        raise BadBody(f"the request did not come within {self._config.body_timeout_s:g} s", 408)

    async def _next_event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                assert not isinstance(event, type) or event is h11.PAUSED
                return event
            if self._h11.they_are_waiting_for_100_continue:
                await self._send(h11.InformationalResponse(status_code=100, headers=[]))
            await self._receive()

    async def _receive(self) -> int:
        """Take bytes from the client, and return how many there were: 0 at the end."""
        try:
            received = bytes(await self._stream.receive_some(_READ_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            received = b""
        self._h11.receive_data(received)
        return len(received)

    async def _linger(self) -> None:
        """Take what is still being sent, so that closing does not reset what the client has yet to read."""
        taken = 0
        with trio.move_on_after(_LINGER_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_eof()
            while taken < _LINGER_BYTES and (received := await self._stream.receive_some(_READ_BYTES)):
                taken += len(received)

    async def _send(self, event: h11.Event) -> None:
        if isinstance(event, h11.Response) and self._h11.their_state is h11.SEND_BODY:
            headers = [*event.headers, (b"Connection", b"close")]
            event = h11.Response(status_code=event.status_code, reason=event.reason, headers=headers)
        encoded = self._h11.send(event)
        if not encoded:
            return
        try:
            with trio.fail_after(self._config.write_timeout_s):
                await self._stream.send_all(encoded)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError) as exc:
            raise Gone from exc

    async def _refuse(self, error: h11.RemoteProtocolError) -> None:
        """Answer what is no HTTP, if nothing was sent yet."""
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = f"{error}\n".encode()
        headers = [
            ("Content-Type", "text/plain"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        with suppress(Gone, h11.LocalProtocolError):
            await self._send(h11.Response(status_code=error.error_status_hint, headers=headers))
            await self._send(h11.Data(data=body))
            await self._send(h11.EndOfMessage())


async def _no_body() -> bytes:
    await trio.lowlevel.checkpoint()
    return b""


def _joined(head: h11.Request) -> dict[str, str]:
    joined: dict[str, str] = {}
    for raw_name, raw_value in head.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


def _has_body(head: h11.Request) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
        for name, value in head.headers
    )


async def _close(stream: HalfCloseableStream, last_words: bytes = b"") -> None:
    """Send, say that this was all, and close; whoever is gone does not mind."""
    try:
        if last_words:
            await stream.send_all(last_words)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        await trio.aclose_forcefully(stream)
