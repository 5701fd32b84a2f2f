"""Connections over lines that lose packets while they have room."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from p2pinfer.node.transport.losses import CONTROL

from .conftest import SINK_PORT
from .lab import Lab
from .namespaces import ROOT

pytestmark = pytest.mark.slow

PROC = Path("/proc/sys/net/ipv4")
BYTES = 400_000


def test_a_connection_that_loses_packets_goes_by_their_rate(bench: Lab) -> None:
    if CONTROL not in (PROC / "tcp_available_congestion_control").read_text(encoding="ascii").split():
        pytest.skip(f"this kernel has no {CONTROL}")
    server = bench.scenario.public_ipv4("server1")
    program = ROOT / "tests" / "lab" / "lossy_upload.py"
    command = (sys.executable, str(program), server, str(SINK_PORT), str(BYTES))
    assert bench.run("radio", *command).split() == [CONTROL]
