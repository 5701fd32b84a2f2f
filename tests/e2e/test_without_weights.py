"""`generate --thin` as a process: what it imports, what memory it takes, and its text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .support import PATIENCE_S, Swarm

pytestmark = pytest.mark.slow

MOST_BYTES = 120_000_000
# The command ends its process by itself, so what is looked at is looked at then.
SCRIPT = """
import json, os, runpy, sys

def leave(code, end=os._exit):
    peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    heavy = sorted({"torch", "numpy", "transformers"} & sys.modules.keys())
    os.write(2, json.dumps({"peak": int(peak[0]) * 1024, "heavy": heavy}).encode() + b"\\n")
    end(code)

os._exit = leave
sys.argv[0] = "p2pinfer"
runpy.run_module("p2pinfer", run_name="__main__")
"""


def unmeasured() -> dict[str, str]:
    """The environment, without what would have coverage run in the process: it takes 10 MB."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_a_client_without_weights_is_light(swarm: Swarm, tmp_path: Path) -> None:
    options = ("--thin", "--json", "--quiet", "--bootstrap", swarm.address, "--data-dir", str(tmp_path))
    draws = ("--seed", "5", "--temperature", "0.8", "--max-new-tokens", "32")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, "generate", *options, *draws, "Once upon a time"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
        env=unmeasured(),
    )
    told, process = json.loads(ran.stdout), json.loads(ran.stderr.splitlines()[-1])
    assert len(told["token_ids"]) == 32
    assert process["heavy"] == []
    assert process["peak"] < MOST_BYTES
