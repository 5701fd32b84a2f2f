"""Real libp2p hosts on loopback, all in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import pytest
import trio

from p2pinfer.node.host import Host, HostConfig, open_host
from p2pinfer.node.identity import Identity, new_identity

from .support import LOOPBACK, StartHost

LIMIT_S = 20.0


@pytest.fixture
async def start_host() -> AsyncGenerator[StartHost]:
    """Starts hosts that end with the test, and ends a test that hangs."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:

        async def start(config: HostConfig = LOOPBACK, identity: Identity | None = None) -> Host:
            return await stack.enter_async_context(open_host(identity or new_identity(), config))

        async def limit() -> None:
            await trio.sleep(LIMIT_S)
            raise TimeoutError(f"the test took more than {LIMIT_S:g} s")

        nursery.start_soon(limit)
        yield start
        nursery.cancel_scope.cancel()
