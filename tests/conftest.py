"""What tests of every folder share: the two trained models."""

from __future__ import annotations

from pathlib import Path

import pytest

import p2pinfer.models


@pytest.fixture(scope="session")
def tiny_stories() -> Path:
    """The bundled model's folder; not to be written to."""
    return Path(p2pinfer.models.__path__[0]) / "tiny-stories"
