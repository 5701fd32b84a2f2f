"""Real libp2p hosts on loopback, all in this process."""

from __future__ import annotations

import pytest
import trio

from p2pinfer.node.host import Host, HostConfig, open_host
from p2pinfer.node.identity import Identity, new_identity

from .support import LOOPBACK, StartHost

LIMIT_S = 20.0


@pytest.fixture
async def start_host(nursery: trio.Nursery) -> StartHost:
    """Starts hosts that end with the test, and ends a test that hangs."""

    async def run(
        config: HostConfig, identity: Identity, task_status: trio.TaskStatus[Host] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with open_host(identity, config) as host:
            task_status.started(host)
            await trio.sleep_forever()

    async def start(config: HostConfig = LOOPBACK, identity: Identity | None = None) -> Host:
        host: Host = await nursery.start(run, config, identity or new_identity())
        return host

    async def limit() -> None:
        await trio.sleep(LIMIT_S)
        raise TimeoutError(f"the test took more than {LIMIT_S:g} s")

    nursery.start_soon(limit)
    return start
