"""The API on a loopback port, in front of a swarm in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.api.app import App
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.http_server import serve_http
from p2pinfer.client import Client
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.concurrency.nurseries import open_nursery

from ..memory_client import open_memory_client
from ..node.memory_swarm import MemorySwarm


@dataclass(frozen=True)
class Door:
    """An API that is served."""

    port: int
    client: Client
    swarm: MemorySwarm

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"


OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]


@pytest.fixture
def open_door(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenDoor:
    """Serves the API over peers `a` and `b`, with the settings, keys and client of the test."""

    @asynccontextmanager
    async def opened(
        api: ApiConfig | None = None, keys: tuple[str, ...] = (), **options: Any
    ) -> AsyncGenerator[Door]:
        config = replace(api or ApiConfig(), port=0)
        async with open_memory_client(checkpoint, monkeypatch, tmp_path, **options) as (client, swarm):
            await swarm.serve("a", 0, 5)
            await swarm.serve("b", 5, 8)
            app = App([client], config, keys)
            async with open_nursery() as nursery:
                ((_, port),) = await nursery.start(serve_http, app.handle, config)
                yield Door(port, client, swarm)

    return opened
