"""Routers behave as their kind: what they do to ports, to what nobody asked for, and to what was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from .conftest import ECHO_PORT, SINK_PORT, traffic
from .lab import Lab

pytestmark = pytest.mark.slow

Send = Callable[..., Any]


def seen(bench: Lab, send: Send, host: str, source: int) -> list[tuple[str, int]]:
    """How two servers see datagrams, and TCP connections, that a host sends from one port."""
    servers = [bench.scenario.public_ipv4(name) for name in ("server1", "server2")]
    found = [send(host, "ask", server, ECHO_PORT, source, 1)[0][:2] for server in servers]
    found += [send(host, "upload", server, SINK_PORT, source, 1)[:2] for server in servers]
    return [(address, port) for address, port in found]


@pytest.mark.parametrize("host", ["cone", "refuser", "double"])
def test_a_port_preserving_router_keeps_the_port_for_everybody(bench: Lab, send: Send, host: str) -> None:
    assert seen(bench, send, host, 5100) == [(bench.scenario.public_ipv4(host), 5100)] * 4


def test_a_symmetric_router_takes_another_port_for_every_flow(bench: Lab, send: Send) -> None:
    found = seen(bench, send, "random", 5101)
    assert {address for address, _ in found} == {bench.scenario.public_ipv4("random")}
    ports = [port for _, port in found]
    assert len({*ports, 5101}) == 5


@pytest.mark.parametrize(
    ("host", "answer"),
    [("cone", "silent"), ("refuser", "refused"), ("random", "silent"), ("double", "silent")],
)
def test_unsolicited_syns_are_dropped_or_refused(bench: Lab, send: Send, host: str, answer: str) -> None:
    address = bench.scenario.public_ipv4(host)
    assert send("server1", "dial", address, 5102) == answer


def test_a_public_host_answers_for_itself(bench: Lab, send: Send) -> None:
    assert send("cone", "dial", bench.scenario.public_ipv4("server1"), SINK_PORT) == "connected"
    assert send("server2", "dial", bench.scenario.public_ipv4("server1"), 5103) == "refused"


def test_hosts_of_one_home_reach_each_other_without_the_router(bench: Lab, send: Send) -> None:
    assert send("cone", "dial", bench.scenario.own_ipv4("sibling"), 5104) == "refused"


def meet(bench: Lab, one: str, other: str, port: int, *, six: bool = False) -> list[str]:
    """Both dial each other's public address from the port they dial; what became of it on either side."""
    address = bench.scenario.public_ipv6 if six else bench.scenario.public_ipv4
    processes = [
        bench.popen(here, traffic("meet", address(there), port, 3), stdout=subprocess.PIPE)
        for here, there in ((one, other), (other, one))
    ]
    return [json.loads(process.communicate(timeout=20)[0]) for process in processes]


def test_two_port_preserving_routers_let_a_hole_be_punched(bench: Lab) -> None:
    assert meet(bench, "cone", "other-cone", 5105) == ["connected"] * 2


def test_a_symmetric_router_does_not(bench: Lab) -> None:
    assert "connected" not in meet(bench, "cone", "random", 5106)


def test_two_firewalls_let_a_hole_be_punched_over_ipv6(bench: Lab, send: Send) -> None:
    assert send("wall1", "dial", bench.scenario.public_ipv6("server1"), SINK_PORT) == "connected"
    assert send("wall1", "dial", bench.scenario.public_ipv6("wall2"), 5107) == "silent"
    assert meet(bench, "wall1", "wall2", 5107, six=True) == ["connected"] * 2


def test_a_router_that_lost_its_table_lets_no_answers_in(bench: Lab, send: Send) -> None:
    server = bench.scenario.public_ipv4("server1")
    send("cone", "ask", server, ECHO_PORT, 5108, 1)
    table = bench.run("cone-router", "conntrack", "-L", "-p", "udp")
    assert "sport=5108" in table
    bench.flush_nat("cone")
    assert "sport=5108" not in bench.run("cone-router", "conntrack", "-L", "-p", "udp")
