"""Metrics in Prometheus' text format, over HTTP on a port of this machine.

Numbers that grow are in `Counts`, and cost an addition each. Numbers that rise and fall are read from what
they belong to when somebody asks. So a node whose metrics nobody wants pays next to nothing, and does not
even import prometheus_client.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import trio

from p2pinfer.errors import AddressUnusable
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.counters import MEANINGS

logger = logging.getLogger(__name__)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX: Final = "p2pinfer_"
_MAX_REQUEST_BYTES: Final = 8192
_REQUEST_TIMEOUT_S: Final = 5.0
_MAX_SCRAPERS: Final = 8


class Metrics:
    """Metrics of a node. Everything that has a number to show adds it by `watch`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self.watch("streams", "Streams that peers have open to us.", lambda: host.gate.streams)
        self._registry: Any = None

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Have `read` called for the gauge `p2pinfer_<name>` whenever somebody asks; the last one counts."""
        self._gauges[name] = (meaning, read)

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

        if self._registry is None:
            self._registry = CollectorRegistry()
            self._registry.register(self)
            ProcessCollector(registry=self._registry)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """Give prometheus_client a family of samples for every metric."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counts = self._host.counts
        for name, (label, meaning) in MEANINGS.items():
            family: Any = CounterMetricFamily(_PREFIX + name, meaning, labels=[label] if label else [])
            for value, amount in counts.by_label(name).items() if label else [("", counts.total(name))]:
                family.add_metric([value] if label else [], amount)
            yield family
        transferred: Any = CounterMetricFamily(
            _PREFIX + "bytes", "Bytes to and from peers.", labels=["connection", "direction"]
        )
        for kind, traffic in counts.traffic.items():
            transferred.add_metric([kind, "sent"], traffic.sent)
            transferred.add_metric([kind, "received"], traffic.received)
        yield transferred
        connected = [self._host.connection_kind(peer_id) for peer_id in self._host.connected_peers()]
        peers: Any = GaugeMetricFamily(_PREFIX + "peers", "Connected peers.", labels=["connection"])
        for kind in counts.traffic:
            peers.add_metric([kind], connected.count(kind))  # type: ignore[arg-type]
        yield peers
        for gauge, (meaning, read) in self._gauges.items():
            yield GaugeMetricFamily(_PREFIX + gauge, meaning, value=read())


async def serve_metrics(
    metrics: Metrics,
    address: str,
    port: int,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer GET /metrics until cancelled; started with the port, which matters where `port` is 0.

    Raises:
        AddressUnusable: The port is taken, or the address is not of this machine.
    """
    importlib.import_module("prometheus_client")  # the first scrape should not wait for it

    try:
        listeners = await trio.open_tcp_listeners(port, host=address)
    except OSError as exc:
        raise AddressUnusable(f"metrics cannot be served on {address}:{port}: {exc.strerror or exc}") from exc
    places = trio.CapacityLimiter(_MAX_SCRAPERS)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream, places:
            with trio.move_on_after(_REQUEST_TIMEOUT_S):
                await _answer(stream, metrics)

    bound: int = listeners[0].socket.getsockname()[1]
    logger.info("metrics are at http://%s:%s/metrics", address, bound)
    task_status.started(bound)
    await trio.serve_listeners(answer, listeners)


async def _answer(stream: trio.SocketStream, metrics: Metrics) -> None:
    request = b""
    try:
        while b"\r\n\r\n" not in request:
            received = await stream.receive_some(_MAX_REQUEST_BYTES)
            request += received
            if not received or len(request) > _MAX_REQUEST_BYTES:
                return
        line = request.split(b"\r\n", 1)[0].split(b" ")
        if line[:1] != [b"GET"]:
            await stream.send_all(_response("405 Method Not Allowed", b""))
        elif line[1:2] not in ([b"/metrics"], [b"/"]):
            await stream.send_all(_response("404 Not Found", b""))
        else:
            await stream.send_all(_response("200 OK", metrics.text()))
    except trio.BrokenResourceError:
        logger.debug("metrics.scraper_gone")


def _response(status: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body
