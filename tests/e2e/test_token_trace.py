"""What one decoded token meets on its way: few modules, and few functions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRACE = Path(__file__).parents[2] / "benchmarks" / "token_trace.py"

MODULES, ENTRIES = 38, 500


@pytest.mark.slow
@pytest.mark.skipif(not TRACE.is_file(), reason="the benchmarks are not here")
def test_a_decoded_token_meets_few_modules_and_functions() -> None:
    """The quietest of 48 steps, so neither gossip nor a slow machine adds to it."""
    run = subprocess.run(
        [sys.executable, str(TRACE)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert len(told["modules"]) <= MODULES, (
        f"off a token's way, or a reason in docs/architecture.md:\n{run.stderr}"
    )
    assert told["entries"] <= ENTRIES, run.stderr
    rooms = {module.rpartition(".")[0] for module in told["modules"]}
    # Both hops and the client took part, and the way was the whole one.
    assert {"generation", "session", "node.transport", "node.serve", "models.compute", "models.text"} <= rooms
    assert told["modules"]["node.transport.tcp"] >= 6
