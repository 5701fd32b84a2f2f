"""Real libp2p hosts on loopback, all in this process."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.node.transport.peer_stream import PeerStream

from .support import LOOPBACK, StartHost, accept

LIMIT_S = 120.0  # what hangs must end; a machine may be slow


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


@pytest.fixture
async def hosts(start_host: StartHost) -> tuple[Host, Host]:
    """Two hosts, the first connected to the second."""
    near, far = await start_host(), await start_host()
    await near.connect(far.peer_id, far.addrs)
    return near, far


@pytest.fixture
async def pair(hosts: tuple[Host, Host]) -> tuple[PeerStream, PeerStream]:
    """The two ends of a stream, on a connection where nothing else is being sent."""
    near, far = hosts
    accepted = accept(far, "/pair")
    ends = await near.open_stream(far.peer_id, "/pair"), await accepted.receive()
    await trio.testing.wait_all_tasks_blocked(0.01)
    return ends
