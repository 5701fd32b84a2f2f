"""Fixtures that the tests here share."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import huggingface_hub.constants
import pytest

from ..hub_server import HubServer
from .hub_client import MODEL, little_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    with HubServer(MODEL, little_model()) as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
