"""Fixtures that the tests here share."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.config import ComputeConfig
from p2pinfer.node import node as node_module
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.node import NodeConfig, run_node
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.node.transport.identity import Identity, load_identity

from .memory_swarm import FLOAT32, open_memory_swarm
from .nodes import QUICK, Node, OpenNode


@pytest.fixture
def open_node(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenNode:
    """Runs a node in a memory swarm."""

    @asynccontextmanager
    async def opened(
        *,
        serve: ServeConfig = QUICK,
        others: tuple[tuple[int, int], ...] = (),
        invented: tuple[tuple[int, int], ...] = (),
        boast: tuple[int, int] | None = None,
        ghost: tuple[int, int] | None = None,
        compute: ComputeConfig = FLOAT32,
        **options: Any,
    ) -> AsyncGenerator[Node]:
        async with open_memory_swarm(checkpoint) as swarm:

            @asynccontextmanager
            async def join(identity: Identity, *_: object, **__: object) -> AsyncGenerator[SwarmMember]:
                yield swarm.member(identity.peer_id)

            monkeypatch.setattr(node_module, "open_swarm", join)
            for index, (start, stop) in enumerate(others):
                swarm.network.host(f"other-{index}")
                swarm.announce(f"other-{index}", start, stop)
            if boast is not None:
                swarm.network.host("boast")
                swarm.announce("boast", *boast, tokens_per_s=1e6)
            for index, (start, stop) in enumerate(invented):
                swarm.announce(f"invented-{index}", start, stop, tokens_per_s=1e6)
            if ghost is not None:  # what the node itself announced before it was killed
                swarm.announce(load_identity(tmp_path).peer_id, *ghost)
            node = Node(swarm)
            config = NodeConfig(data_dir=tmp_path, cache_dir=tmp_path, **options)

            async def run() -> None:
                with node.scope:
                    await run_node(config, compute_config=compute, serve_config=serve, report=node.report)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                yield node
                node.scope.cancel()

    return opened
