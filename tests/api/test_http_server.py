"""The HTTP server over streams in memory: bounds, hang-ups, and what is no HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import h11
import pytest
import trio
import trio.testing
from trio.testing import MockClock, memory_stream_pair

from p2pinfer.api.config import ApiConfig
from p2pinfer.api.http_server import BadBody, HttpServer, Reply, Request, serve_http
from p2pinfer.errors import AddressUnusable
from p2pinfer.node.concurrency.nurseries import open_nursery

Stream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]
GET = b"GET /hello?x=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Handler:
    """Tells what was asked; `/stream` goes on until it is stopped."""

    def __init__(self) -> None:
        self.cancelled = trio.Event()
        self.release = trio.Event()

    async def __call__(self, request: Request, reply: Reply) -> None:
        match request.path:
            case "/stream":
                await reply.begin(200, [("Content-Type", "text/plain")])
                try:
                    await reply.send(b"piece")
                    await self.release.wait()
                    await reply.end()
                except trio.Cancelled:
                    self.cancelled.set()
                    raise
            case "/broken":
                raise RuntimeError("a handler's bug")
            case "/unread":
                await reply.whole(403, [], b"no")
            case _:
                try:
                    body = await request.read()
                except BadBody as exc:
                    return await reply.whole(exc.status, [], str(exc).encode())
                await reply.whole(200, [], f"{request.method} {request.path} {len(body)}".encode())
        return None


class Talk:
    """A client's end of a connection."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._h11 = h11.Connection(h11.CLIENT)

    async def send(self, sent: bytes) -> None:
        await self.stream.send_all(sent)

    async def answer(self, method: str = "GET") -> tuple[int, bytes]:
        """Status and body of the next answer."""
        self._h11 = h11.Connection(h11.CLIENT) if self._h11.our_state is h11.DONE else self._h11
        self._h11.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        self._h11.send(h11.EndOfMessage())
        status, body = 0, b""
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                self._h11.receive_data(bytes(await self.stream.receive_some()))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                rest = self._h11.trailing_data[0]
                self._h11 = h11.Connection(h11.CLIENT)
                if rest:
                    self._h11.receive_data(rest)
                return status, body

    async def is_closed(self) -> bool:
        return await self.stream.receive_some() == b""


Connect = Callable[..., AbstractAsyncContextManager[tuple[Talk, Handler, HttpServer]]]


@pytest.fixture
def connect() -> Connect:
    @asynccontextmanager
    async def connected(**settings: Any) -> AsyncGenerator[tuple[Talk, Handler, HttpServer]]:
        handler = Handler()
        server = HttpServer(handler, ApiConfig(**settings))
        ours, theirs = memory_stream_pair()
        async with open_nursery() as nursery:
            nursery.start_soon(server.serve, theirs)
            yield Talk(ours), handler, server

    return connected


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    head = [b"POST " + path.encode() + b" HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*head, b"", body])


async def test_requests_are_answered_one_after_the_other_also_those_that_came_together(
    connect: Connect,
) -> None:
    async with connect() as (talk, _, _):
        await talk.send(GET)
        assert await talk.answer() == (200, b"GET /hello 0")
        await talk.send(post("/a", b"x" * 9) + GET + post("/b", b""))
        assert [await talk.answer() for _ in range(3)] == [
            (200, b"POST /a 9"),
            (200, b"GET /hello 0"),
            (200, b"POST /b 0"),
        ]
        chunked = b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        await talk.send(chunked)
        assert await talk.answer() == (200, b"POST /c 3")


async def test_head_has_no_body_and_a_client_that_waits_is_told_to_continue(connect: Connect) -> None:
    async with connect() as (talk, _, _):
        await talk.send(b"HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            received += await talk.stream.receive_some()
        assert b"HTTP/1.1 200 OK\r\n" in received
        await talk.send(
            post("/a", b"", b"Expect: 100-continue")[:-4].replace(b"Length: 0", b"Length: 2") + b"\r\n\r\n"
        )
        assert (await talk.stream.receive_some()).startswith(b"HTTP/1.1 100 ")
        await talk.send(b"ab")
        assert await talk.answer() == (200, b"POST /a 2")


async def test_a_client_that_hangs_up_ends_what_is_done_for_it(connect: Connect) -> None:
    async with connect() as (talk, handler, _):
        await talk.send(GET.replace(b"/hello", b"/stream"))
        while b"piece" not in await talk.stream.receive_some():
            pass
        await talk.stream.aclose()
        await handler.cancelled.wait()


async def test_what_is_sent_while_an_answer_comes_is_the_next_request_and_bounded(connect: Connect) -> None:
    async with connect() as (talk, handler, _):
        await talk.send(GET.replace(b"/hello", b"/stream") + GET[:10])
        await talk.send(GET[10:])
        handler.release.set()
        assert await talk.answer() == (200, b"piece")
        assert await talk.answer() == (200, b"GET /hello 0")
        handler.release = trio.Event()
        await talk.send(GET.replace(b"/hello", b"/stream") + b"x" * 200_000)
        await handler.cancelled.wait()


async def test_a_body_that_is_too_long_too_slow_or_no_http_is_refused_and_the_connection_closed(
    connect: Connect,
    autojump_clock: MockClock,
) -> None:
    for sent, status in (
        (post("/a", b"x" * 2000), 413),
        (post("/a", b"xx")[:-1], 408),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (post("/unread", b"x" * 5000), 403),
    ):
        async with connect(max_body_bytes=1000) as (talk, _, _):
            await talk.send(sent)
            assert (await talk.answer())[0] == status
            assert await talk.is_closed()


async def test_what_is_no_http_or_comes_too_slowly_is_refused(
    connect: Connect, autojump_clock: MockClock
) -> None:
    for sent, status in (
        (b"\x16\x03\x01 hello\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"x" * 20_000, 431),
        (GET[:20], 408),
    ):
        async with connect() as (talk, _, _):
            await talk.send(sent)
            assert (await talk.answer())[0] == status
            assert await talk.is_closed()


async def test_an_idle_connection_is_closed_and_one_whose_handler_fails_is_cut(
    connect: Connect, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect() as (talk, _, _):
        assert await talk.is_closed()
        assert trio.current_time() > 70
    async with connect() as (talk, _, _):
        await talk.send(GET.replace(b"/hello", b"/broken"))
        assert await talk.is_closed()
    assert "a handler's bug" in caplog.text
    caplog.clear()


async def test_a_client_that_takes_nothing_is_given_up(connect: Connect, autojump_clock: MockClock) -> None:
    async with connect(write_timeout_s=5) as (talk, handler, server):
        ours, theirs = trio.testing.lockstep_stream_pair()  # whose senders wait for a reader
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, theirs)
            await ours.send_all(GET)
        assert trio.current_time() < 20
        assert not handler.cancelled.is_set()
        await talk.stream.aclose()


async def test_answers_may_end_and_idle_connections_are_closed_when_the_server_leaves(
    connect: Connect,
    autojump_clock: MockClock,
) -> None:
    async with connect() as (talk, handler, server):
        await talk.send(GET.replace(b"/hello", b"/stream"))
        idle, theirs = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, theirs)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(server.drain)
            assert await Talk(idle).is_closed()
            handler.release.set()
            assert await talk.answer() == (200, b"piece")
            assert await talk.is_closed()


async def test_too_many_connections_are_told_to_come_back(connect: Connect) -> None:
    async with connect(max_connections=1) as (talk, _, server):
        await talk.send(GET)
        await talk.answer()
        more, theirs = memory_stream_pair()
        await server.serve(theirs)
        assert (await more.receive_some()).startswith(b"HTTP/1.1 503 ")


async def test_an_answer_in_work_ends_before_a_cancelled_server_does() -> None:
    """Over real sockets: the listener is closed at once, the answer is whole."""
    handler, config = Handler(), ApiConfig(port=0)
    async with trio.open_nursery() as nursery:
        ((_, port),) = await nursery.start(partial(serve_http, handler, config))
        with pytest.raises(
            AddressUnusable, match=f"cannot listen on 127.0.0.1 port {port}: .*choose another"
        ):
            await serve_http(handler, ApiConfig(port=port))
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(GET.replace(b"/hello", b"/stream"))
        received = await stream.receive_some()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            handler.release.set()
            async with stream:
                async for more in stream:
                    received += more
        assert received.endswith(b"0\r\n\r\n")
