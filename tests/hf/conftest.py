"""Folders of models, written once for each module of tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ..models.conftest import write_checkpoint as write_checkpoint  # a fixture

WriteCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module", params=["gemma2", "llama", "mistral", "mixtral", "qwen2", "qwen3"])
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_checkpoint: WriteCheckpoint,
) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: WriteCheckpoint) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama")
