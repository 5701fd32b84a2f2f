"""Metrics over HTTP, of a real host."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from p2pinfer.errors import AddressUnusable
from p2pinfer.node.metrics import Metrics, serve_metrics
from p2pinfer.node.node import _watch_span  # pyright: ignore[reportPrivateUsage]
from p2pinfer.node.transport.counters import MEANINGS

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


DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"
_METRIC = re.compile(r"\b((?:p2pinfer|process)_\w+)")
_LABELS = re.compile(r"(\w+)\s*\{(.*?)\}|by \(([\w, ]+)\)")


async def test_the_dashboard_asks_for_metrics_that_there_are(metrics: Metrics, ask: Ask) -> None:
    """Each metric in each expression, and each label by which one is taken apart."""
    host = metrics._host  # pyright: ignore[reportPrivateUsage]
    for name, (label, _) in MEANINGS.items():
        host.counts.add(name, "one" if label else "")
    cache = SimpleNamespace(capacity_tokens=2, free_tokens=1)
    parts: Any = SimpleNamespace(sessions=1, replay_bytes=1, cache=cache, queued=0)
    _watch_span(metrics, parts, parts, parts)
    answer = (await ask(b"GET /metrics HTTP/1.1\r\n\r\n")).partition(b"\r\n\r\n")[2].decode()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(answer):
        for sample in family.samples:
            labels.setdefault(sample.name, {"instance"}).update(sample.labels)
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for each in expressions for name in _METRIC.findall(each)}
    assert asked <= labels.keys(), asked - labels.keys()
    missing = {name for name in labels if name.startswith("p2pinfer_")} - asked
    assert not missing, "not on the dashboard"
    for each in expressions:
        (*_, name) = _METRIC.findall(each)
        for _, within, by in _LABELS.findall(each):
            named = re.findall(r"(\w+)\s*=~?", within) + re.findall(r"\w+", by)
            assert set(named) <= labels[name], each
