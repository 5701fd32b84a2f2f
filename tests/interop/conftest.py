"""Where js-libp2p is, and hosts of ours to meet it; skipped where there can be no JavaScript."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..npm_packages import CannotRun, installed
from .javascript import HERE, OLDEST_NODE


@pytest.fixture(scope="session")
def javascript() -> tuple[Path, str]:
    """The folder in which js-libp2p runs, and its node; without them a line says why tests are skipped."""
    try:
        return installed(HERE, OLDEST_NODE, fetch=True, brought=False)
    except CannotRun as exc:
        pytest.skip(f"js-libp2p: {exc}")
