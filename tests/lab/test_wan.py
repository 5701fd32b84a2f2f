"""The internet between the sites: what its lines do to packets, on paper and to real sockets."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import ECHO_PORT, SINK_PORT
from .lab import Lab
from .scenario import Line
from .wan import Counters, Internet, Way, destination

PREFIXES = {bytes((11, 0, 1)): "a", bytes((11, 0, 2)): "b", bytes((0x2A, 0xBC, 0, 0, 0, 2)): "b"}


def packet(to: tuple[int, int, int] = (11, 0, 2), size: int = 1000) -> bytes:
    """An IPv4 packet as far as the internet looks at it."""
    return (b"\x45" + bytes(15) + bytes((*to, 1))).ljust(size, b"\0")


def internet(a: Line, b: Line) -> Internet:
    return Internet({"a": a, "b": b}, PREFIXES, random.Random(1))


def arrivals(net: Internet) -> list[tuple[float, str]]:
    """When and where everything under way arrives."""
    found: list[tuple[float, str]] = []
    while (at := net.next_at()) is not None:
        found += [(at, site) for site, _ in net.due(at)]
    return found


def test_a_packet_takes_both_lines_delays_and_its_time_on_either() -> None:
    net = internet(Line(delay_ms=10, up_mbit=8), Line(delay_ms=20, down_mbit=4))
    net.send("a", packet(size=1000), now=5.0)
    ((at, site),) = arrivals(net)
    assert site == "b"
    assert at == pytest.approx(5.0 + 0.001 + 0.010 + 0.002 + 0.020)


def test_packets_queue_for_the_line_and_overflow_its_queue() -> None:
    net = internet(Line(delay_ms=0, up_mbit=8, queue_ms=5), Line(delay_ms=0, down_mbit=8000))
    for _ in range(10):
        net.send("a", packet(size=1000), now=0.0)
    assert [at for at, _ in arrivals(net)] == pytest.approx([n / 1000 for n in range(1, 7)], abs=1e-4)
    assert net.counters["a"] == Counters(carried=6, carried_bytes=6000, overflowed=4)


def test_jitter_delays_and_never_reorders() -> None:
    way = Way(1e9, Line(delay_ms=10, jitter_ms=30), random.Random(3))
    times = [way.accept(100, n / 1000, Counters()) for n in range(500)]
    assert all(time is not None for time in times)
    came = [time for time in times if time is not None]
    assert came == sorted(came)
    delays = [time - n / 1000 for n, time in enumerate(came)]
    assert min(delays) >= 0.010
    assert 0.030 < max(delays) <= 0.0401


def test_a_line_loses_its_share_and_a_cut_line_everything() -> None:
    counters = Counters()
    way = Way(1e9, Line(loss=0.3), random.Random(4))
    lost = sum(way.accept(100, float(n), counters) is None for n in range(10_000))
    assert 2_800 < lost < 3_200
    assert counters.lost == lost
    cut = Way(1e9, Line(loss=1.0), random.Random(4))
    assert all(cut.accept(100, float(n), counters) is None for n in range(1000))


def test_what_is_addressed_to_nowhere_is_counted_and_dropped() -> None:
    net = internet(Line(), Line())
    for stray in (packet((8, 8, 8)), packet((11, 0, 1)), b"", b"\x45", b"\x60" + bytes(30), b"\x00" * 60):
        net.send("a", stray, now=0.0)
    assert arrivals(net) == []
    assert net.counters["a"].unroutable == 6


def test_ipv6_is_carried_like_ipv4() -> None:
    six = b"\x60" + bytes(23) + bytes((0x2A, 0xBC, 0, 0, 0, 2)) + bytes(10)
    assert destination(six) == bytes((0x2A, 0xBC, 0, 0, 0, 2))
    net = internet(Line(), Line())
    net.send("a", six, now=0.0)
    assert [site for _, site in arrivals(net)] == ["b"]


def test_a_line_can_change_while_packets_are_under_way() -> None:
    net = internet(Line(delay_ms=10), Line(delay_ms=0))
    net.send("a", packet(), now=0.0)
    net.change("a", Line(loss=1.0))
    net.send("a", packet(), now=0.0)
    assert len(arrivals(net)) == 1


# ---------------------------------------------------------------------- in namespaces, with real sockets


@pytest.mark.slow
def test_sockets_see_the_delay_of_both_lines(bench: Lab, send: Callable[..., Any]) -> None:
    server = bench.scenario.public_ipv4("server1")
    times = [seconds for _, _, seconds in send("far", "ask", server, ECHO_PORT, 5000, 40)]
    assert len(times) == 40
    assert 0.100 <= min(times) < 0.110  # twice 45 + 5 ms; the rest is this machine's
    assert statistics.median(times) < 0.150


@pytest.mark.slow
def test_sockets_see_the_bandwidth_of_the_narrower_line(bench: Lab, send: Callable[..., Any]) -> None:
    server = bench.scenario.public_ipv4("server1")
    _, _, count, seconds = send("narrow", "upload", server, SINK_PORT, 5001, 1_500_000)
    assert count == 1_500_000
    assert 6.0 < count * 8 / seconds / 1e6 < 8.0  # of 8 Mbit/s, less headers


@pytest.mark.slow
def test_sockets_see_the_loss_in_both_directions(bench: Lab, send: Callable[..., Any]) -> None:
    server = bench.scenario.public_ipv4("server1")
    answers = send("lossy", "ask", server, ECHO_PORT, 5002, 600, 32, 500)
    assert 0.54 < len(answers) / 600 < 0.74  # 0.8 x 0.8 = 0.64, and five standard deviations


@pytest.mark.slow
def test_a_blackholed_host_hears_nothing_and_is_told_nothing(bench: Lab, send: Callable[..., Any]) -> None:
    server = bench.scenario.public_ipv4("server1")
    for host in ("far", "cone"):
        assert send(host, "dial", server, SINK_PORT) == "connected"
        bench.blackhole(host)
        assert send(host, "dial", server, SINK_PORT) == "silent"
        bench.heal(host)
        assert send(host, "dial", server, SINK_PORT) == "connected"


@pytest.mark.slow
def test_a_site_whose_line_is_down_knows_it_at_once(bench: Lab, send: Callable[..., Any]) -> None:
    server = bench.scenario.public_ipv4("server1")
    bench.link_down("cone")
    assert send("cone", "dial", server, SINK_PORT) == "unreachable"
    bench.link_up("cone")
    assert send("cone", "dial", server, SINK_PORT) == "connected"
