"""A command line run in this process, and a swarm of two real nodes to run it against."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from .support import start_node, wait_ready


@pytest.fixture(autouse=True)
def _undo_logging(undo_logging: None) -> None:
    """Every test here runs commands."""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration and no identity of whoever runs the tests, and a working directory without peers."""
    for kind in ("DATA", "CONFIG", "CACHE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind.lower()))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No word on what is being waited for: how long that takes depends on what else this machine does."""
    monkeypatch.setattr("p2pinfer.cli.output.waiting.PATIENCE_S", 3600.0)


@pytest.fixture(scope="package")
def swarm_address(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Where to join a swarm of two node processes that hold blocks 0:5 and 3:8 of the bundled model."""
    first = start_node(tmp_path_factory.mktemp("first"), "0:5")
    address: str = wait_ready(first)["addrs"][0]
    second = start_node(tmp_path_factory.mktemp("second"), "3:8", "--bootstrap", address)
    try:
        wait_ready(second)
        yield address
    finally:
        for node in (first, second):
            node.terminate()
            node.communicate(timeout=90)
