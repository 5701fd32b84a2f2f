"""Node processes for tests of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..forking import Command, fork_server


def start_node(home: Path, blocks: str | None, *more: str) -> Command:
    """A node of these blocks, or a bootstrap node."""
    argv = ["node", "--json", "--until-stdin-closes"]
    argv += ["--no-blocks"] if blocks is None else ["--blocks", blocks]
    argv += ["--listen", "/ip4/127.0.0.1/tcp/0", "--data-dir", str(home)]
    return fork_server().start([*argv, "--set", "compute.threads=1", *more], cwd=home)


def spoken(said: str) -> str:
    """What a command wrote to standard error, less the lines on what it waited for."""
    return "".join(line for line in said.splitlines(keepends=True) if not line.endswith(" ...\n"))


def wait_ready(node: Command) -> dict[str, Any]:
    assert node.stdout is not None
    for line in node.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "ready":
            return event
    _, said = node.communicate(timeout=90)
    pytest.fail(f"the node did not start: {said}")
