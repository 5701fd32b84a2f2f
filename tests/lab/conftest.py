"""A lab that runs, for tests of its parts; skipped where there can be none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

from .lab import Lab, open_lab
from .namespaces import ROOT, why_not
from .scenario import Line, Scenario, Site
from .scenarios import KINDS

ECHO_PORT = 7
SINK_PORT = 9

BENCH = Scenario(
    "bench",
    "lines of known character and a router of every kind",
    (
        Site("server1", line=Line(delay_ms=5, up_mbit=1000, down_mbit=1000), ipv6=True),
        Site("server2", line=Line(delay_ms=5, up_mbit=1000, down_mbit=1000)),
        Site("far", line=Line(delay_ms=45, jitter_ms=0)),
        Site("narrow", line=Line(delay_ms=5, up_mbit=8, down_mbit=16)),
        Site("lossy", line=Line(delay_ms=5, loss=0.2)),
        Site("radio", line=Line(delay_ms=20, loss=0.05)),
        Site("cone", ("cone", "sibling"), KINDS["port-preserving"]),
        Site("cone2", ("other-cone",), KINDS["port-preserving"]),
        Site("rst", ("refuser",), KINDS["RST-ing"]),
        Site("random", ("random",), KINDS["symmetric"]),
        Site("double", ("double",), KINDS["double NAT"]),
        Site("wall1", ("wall1",), ("firewall",), ipv6=True, ipv4=False),
        Site("wall2", ("wall2",), ("firewall",), ipv6=True, ipv4=False),
    ),
)


@pytest.fixture(scope="session")
def in_a_lab() -> None:
    """Skips where namespaces, iptables or TUN are missing, and says which."""
    if obstacle := why_not():
        pytest.skip(obstacle)


@pytest.fixture(scope="session")
def bench(in_a_lab: None) -> Generator[Lab]:
    """The scenario above, with echo and sink servers on both public servers."""
    with open_lab(BENCH) as lab:
        for server in ("server1", "server2"):
            for what, port in (("echo", ECHO_PORT), ("sink", SINK_PORT)):
                process = lab.popen(server, traffic(what, port), cwd=ROOT, stdout=subprocess.PIPE)
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
        yield lab


def traffic(*words: object) -> list[str]:
    """The command line of tests/lab/traffic.py."""
    # -S: what site would import is not needed, and takes most of the start.
    return [sys.executable, "-S", str(ROOT / "tests" / "lab" / "traffic.py"), *map(str, words)]


@pytest.fixture
def send(bench: Lab) -> Callable[..., Any]:
    """Runs traffic.py in a host, and returns what it found."""

    def run(host: str, *words: object) -> Any:
        return json.loads(bench.run(host, *traffic(*words)))

    return run
