"""Node processes for tests of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def start_node(home: Path, blocks: str | None, *more: str) -> subprocess.Popen[str]:
    """A node of these blocks, or an introducer."""
    command = [sys.executable, "-m", "p2pinfer", "node", "--json", "--until-stdin-closes"]
    command += ["--no-blocks"] if blocks is None else ["--blocks", blocks]
    command += ["--listen", "/ip4/127.0.0.1/tcp/0", "--data-dir", str(home)]
    command += ["--set", "compute.threads=1", *more]
    return subprocess.Popen(
        command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def spoken(said: str) -> str:
    """What a command wrote to standard error, less the lines on what it waited for."""
    return "".join(line for line in said.splitlines(keepends=True) if not line.endswith(" ...\n"))


def wait_ready(node: subprocess.Popen[str]) -> dict[str, Any]:
    assert node.stdout is not None
    for line in node.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "ready":
            return event
    _, said = node.communicate(timeout=20)
    pytest.fail(f"the node did not start: {said}")
