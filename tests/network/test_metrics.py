"""Metrics over HTTP, of a real host."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from p2pinfer.errors import AddressUnusable
from p2pinfer.node.metrics import Metrics, serve_metrics

from .support import ECHO, StartHost, echo

Ask = Callable[[bytes], Awaitable[bytes]]


@pytest.fixture
async def metrics(start_host: StartHost) -> Metrics:
    return Metrics(await start_host())


@pytest.fixture
async def ask(metrics: Metrics, nursery: trio.Nursery) -> Ask:
    """Sends a request, returns the answer to its end."""
    port: int = await nursery.start(serve_metrics, metrics, "127.0.0.1", 0)

    async def asked(request: bytes) -> bytes:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(request)
            answer = b""
            with trio.fail_after(60):
                while received := await stream.receive_some():
                    answer += received
            return answer

    return asked


def values(answer: bytes) -> dict[tuple[str, ...], float]:
    """What the answer says, by name and label values."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


async def test_what_was_counted_and_what_is_watched_can_be_read(
    metrics: Metrics, ask: Ask, start_host: StartHost
) -> None:
    host, other = metrics._host, await start_host()  # pyright: ignore[reportPrivateUsage]
    host.serve(ECHO, echo)
    stream = await other.open_stream(host.peer_id, ECHO, host.addrs)
    await stream.send_all(b"x" * 1000)
    await stream.receive_some()
    host.counts.add("refusals", "busy")
    host.counts.add("refusals", "over_share", 2)
    host.counts.add("failovers")
    metrics.watch("sessions", "Open sessions.", lambda: 7)
    read = values(await ask(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n"))
    assert read["p2pinfer_refusals_total", "busy"] == 1
    assert read["p2pinfer_refusals_total", "over_share"] == 2
    assert read["p2pinfer_failovers_total",] == 1
    assert read["p2pinfer_batches_total",] == 0
    assert read["p2pinfer_sessions",] == 7
    assert read["p2pinfer_streams",] >= 1
    assert read["p2pinfer_peers", "direct"] == 1
    assert read["p2pinfer_peers", "relayed"] == 0
    assert read["p2pinfer_bytes_total", "direct", "received"] >= 1000
    assert read["p2pinfer_bytes_total", "relayed", "received"] == 0
    assert read["process_open_fds",] > 0


async def test_other_requests_are_refused(ask: Ask) -> None:
    assert (await ask(b"GET /secrets HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404")
    assert (await ask(b"POST /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405")
    assert (await ask(b"\r\n\r\n")).startswith(b"HTTP/1.1 405")


async def test_a_request_without_end_is_cut_off(ask: Ask) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await ask(b"GET /" + b"x" * 1_000_000)


async def test_who_asks_and_says_nothing_is_cut_off(
    metrics: Metrics, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pinfer.node.metrics._REQUEST_TIMEOUT_S", 0.1)
    port: int = await nursery.start(serve_metrics, metrics, "127.0.0.1", 0)
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        with trio.fail_after(60):
            assert await stream.receive_some() == b""


async def test_a_port_that_is_taken_is_one_line(metrics: Metrics, nursery: trio.Nursery) -> None:
    port: int = await nursery.start(serve_metrics, metrics, "127.0.0.1", 0)
    with pytest.raises(AddressUnusable, match=f"metrics cannot be served on 127.0.0.1:{port}: .*in use"):
        await serve_metrics(metrics, "127.0.0.1", port)
