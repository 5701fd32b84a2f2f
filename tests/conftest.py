"""What tests of every folder share: the two trained models, and a clean log."""

from __future__ import annotations

import os

# Matrices this small only get slower by sharing, and who waits for a thread's part keeps a core of another
# worker busy. OpenMP reads it once, here and in the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import importlib.util
import logging
import signal
import warnings
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from torch import Tensor

import p2pinfer.models
from p2pinfer.client import Client
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint

from .clients import OpenClient
from .memory_client import open_memory_client
from .node.memory_swarm import MemorySwarm
from .spares import hidden_states, on_one_machine

# The first draw of a text takes seconds on a machine that has never made one: hypothesis builds its tables of
# characters then. How fast examples are made or run says nothing of what is tested.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("p2pinfer", PATIENT, max_examples=50)
settings.register_profile("sweep", PATIENT, max_examples=250)
settings.load_profile("p2pinfer")


# What `nohup` ignores, commands go on ignoring, and tests would wait for it to end them.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Have no later collection of garbage look at all that was imported, a second's work in a whole run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def quiet_lan() -> Generator[None]:
    """Neither these processes nor those they start look for peers in the local network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("P2PINFER_HOST__MDNS", "false")
        yield


@pytest.fixture(scope="session")
def tiny_stories() -> Path:
    """The bundled model's folder; not to be written to."""
    return Path(p2pinfer.models.__path__[0]) / "tiny-stories"


@pytest.fixture(scope="session")
def checkpoint(tiny_stories: Path) -> Checkpoint:
    """The bundled model's."""
    return open_checkpoint(tiny_stories, "tiny-stories")


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """What sessions that lose hops are given."""
    return hidden_states()


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint, inputs: Tensor) -> Tensor:
    """What must come out of them."""
    return on_one_machine(checkpoint, inputs)


@pytest.fixture(scope="session")
def smollm2_script() -> ModuleType:
    """benchmarks/smollm2.py, loaded by its path: scripts are no package, and the tests may run on a wheel."""
    path = Path(__file__).parent.parent / "benchmarks" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def smollm2(smollm2_script: ModuleType) -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched once into the user's cache."""
    try:
        return Path(smollm2_script.smollm2_folder())
    except smollm2_script.CannotFetch as exc:
        pytest.skip(f"SmolLM2 is not here: {exc}")


@pytest.fixture
def undo_logging() -> Generator[None]:
    """A command sets up logging for the process it thinks is its own."""
    loggers = [logging.getLogger(name) for name in (None, "p2pinfer")]
    before = [(logger.handlers[:], logger.level) for logger in loggers]
    last_resort = logging.lastResort
    with warnings.catch_warnings():
        yield
        logging.captureWarnings(False)
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
    logging.lastResort = last_resort


@pytest.fixture
def open_client(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenClient:
    """Opens a client in a memory swarm."""

    @asynccontextmanager
    async def opened(**options: Any) -> AsyncGenerator[tuple[Client, MemorySwarm]]:
        async with open_memory_client(checkpoint, monkeypatch, tmp_path, **options) as opened:
            yield opened

    return opened
