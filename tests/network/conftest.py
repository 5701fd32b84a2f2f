"""Real libp2p hosts on loopback, all in this process."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.swarm.gossip import open_gossip
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.node.transport.peer_stream import PeerStream

from .members import REVISION, Join, Member
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


@pytest.fixture
async def join(start_host: StartHost, nursery: trio.Nursery) -> Join:
    """Starts members that end with the test; those with a revision are in its topic."""

    async def run(
        member_of: str | None, task_status: trio.TaskStatus[Member] = trio.TASK_STATUS_IGNORED
    ) -> None:
        identity, view = new_identity(), LiveTable()
        host = await start_host(identity=identity)
        async with open_gossip(host, identity, view) as gossip:
            if member_of is not None:
                await gossip.join(member_of)
                await gossip.join(member_of)
            task_status.started(Member(identity, host, gossip, view))
            if member_of is None:
                await gossip.follow_neighbours()
            await trio.sleep_forever()

    async def start(revision: str | None = REVISION) -> Member:
        member: Member = await nursery.start(run, revision)
        return member

    return start
