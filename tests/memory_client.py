"""A client in a swarm in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from p2pinfer import client as client_module
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig, SessionConfig
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.node.transport.identity import Identity

from .node.memory_swarm import FLOAT32, MemorySwarm, open_memory_swarm

STORY = "Once upon a time there was a little girl who had a big red ball. " * 5
NEXT = " The next day, her mom said"

OpenClient = Callable[..., AbstractAsyncContextManager[tuple[Client, MemorySwarm]]]


@asynccontextmanager
async def open_memory_client(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any
) -> AsyncGenerator[tuple[Client, MemorySwarm]]:
    """A client and its swarm; `folder` is where it keeps what it keeps.

    It takes a token a trip, unless it is given another config. How many it would take goes by what trips were
    measured to cost, so on a busy machine a text could be over before the test is at the middle of it.
    """
    async with open_memory_swarm(checkpoint) as swarm:

        @asynccontextmanager
        async def join(identity: Identity, *_: object) -> AsyncGenerator[SwarmMember]:
            yield swarm.member(identity.peer_id)

        monkeypatch.setattr(client_module, "open_swarm", join)
        options.setdefault("config", ClientConfig(dtype="float32", speculate="off"))
        options.setdefault("audit", AuditConfig(rate=0.0))
        options.setdefault("session_config", SessionConfig(slow_step_s=60.0))  # machines may be busy
        async with Client(cache_dir=folder, data_dir=folder, **options) as client:
            yield client, swarm


def three_hops(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, folder: Path) -> OpenClient:
    """Opens a client in a swarm of three hops, which draw tokens where it is thin."""

    @asynccontextmanager
    async def opened(**options: Any) -> AsyncGenerator[tuple[Client, MemorySwarm]]:
        async with open_memory_client(checkpoint, monkeypatch, folder, **options) as (client, swarm):
            ends = load_embedding_and_head(checkpoint, FLOAT32)
            for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
                await swarm.serve(name, start, stop, ends=ends)
            yield client, swarm

    return opened


def forget_texts(client: Client) -> None:
    """Let the next text begin without those before it."""
    client._kept_texts._texts.clear()  # pyright: ignore[reportPrivateUsage]
