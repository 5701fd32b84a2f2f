"""Where js-libp2p is, and hosts of ours to meet it; skipped where there can be no JavaScript."""

from __future__ import annotations

from pathlib import Path

import pytest

from .javascript import CannotRun, installed


@pytest.fixture(scope="session")
def javascript() -> Path:
    """The folder in which js-libp2p runs; tests without it are skipped with a line that says why."""
    try:
        return installed()
    except CannotRun as exc:
        pytest.skip(str(exc))
