"""Nodes over a swarm in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.events import Event, Ready
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session

from .memory_swarm import MemorySwarm

QUICK = ServeConfig(announce_interval_s=0.02, announce_min_gap_s=0.01, settle_s=0.01)


class Node:
    """A node that runs, and what it reported."""

    def __init__(self, swarm: MemorySwarm) -> None:
        self.swarm = swarm
        self.events: list[Event] = []
        self.scope = trio.CancelScope()
        self._arrived = trio.Event()

    def report(self, event: Event) -> None:
        self.events.append(event)
        self._arrived.set()

    async def wait_for(self, kind: type[Event], count: int = 1) -> Any:
        """The `count`-th event of a kind."""
        while len(found := [event for event in self.events if isinstance(event, kind)]) < count:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return found[count - 1]

    async def session(self) -> Session:
        """A session on all that the node serves."""
        ready = [event for event in self.events if isinstance(event, Ready)][-1]
        assert ready.blocks is not None
        return await start_session(
            self.swarm.network.nursery,
            open_session(
                self.swarm.network.host("client"),
                Route((Hop(ready.peer_id, BlockSpan(*ready.blocks)),)),
                self.swarm.spec,
                max_tokens=64,
                codec="float32",
                config=SessionConfig(),
            ),
        )


OpenNode = Callable[..., AbstractAsyncContextManager[Node]]
