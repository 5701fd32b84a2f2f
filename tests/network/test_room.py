"""A host with few places, which makes room for those who come."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from p2pinfer.errors import PeerUnreachable
from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.swarm.connection_pruning import ConnectionPruning

from .support import ECHO, LOOPBACK, StartHost, echo

SMALL = HostConfig(listen=LOOPBACK.listen, max_connections=8)  # crowded with 8, roomy with 6


async def _visit(start_host: StartHost, host: Host) -> Host:
    visitor = await start_host(HostConfig(listen=()))
    with trio.fail_after(60):
        while visitor.peer_id not in host.connected_peers():
            with suppress(PeerUnreachable):  # the last place was taken, and is about to be free
                await visitor.connect(host.peer_id, host.addrs)
            await trio.sleep(0.01)
    return visitor


async def _until_gone(host: Host, peer_id: str) -> None:
    with trio.fail_after(60):
        while peer_id in host.connected_peers():
            await trio.sleep(0.01)


async def test_who_only_gossips_makes_room_for_who_comes(
    start_host: StartHost, nursery: trio.Nursery
) -> None:
    host = await start_host(SMALL)
    nursery.start_soon(ConnectionPruning(host, lambda _: False, 0.0).keep)
    visitors = [await _visit(start_host, host) for _ in range(16)]
    await _until_gone(host, visitors[0].peer_id)
    assert visitors[-1].peer_id in host.connected_peers()
    assert len(host.connected_peers()) >= 6


async def test_who_is_at_work_or_is_needed_stays(start_host: StartHost, nursery: trio.Nursery) -> None:
    host = await start_host(SMALL)
    host.serve(ECHO, echo)
    working, needed, idle = [await _visit(start_host, host) for _ in range(3)]
    nursery.start_soon(ConnectionPruning(host, lambda peer_id: peer_id == needed.peer_id, 0.0).keep)
    async with await working.open_stream(host.peer_id, ECHO) as stream:
        for _ in range(5):
            await _visit(start_host, host)
        await _until_gone(host, idle.peer_id)
        assert {working.peer_id, needed.peer_id} < set(host.connected_peers())
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"


async def test_a_newcomer_has_its_time(start_host: StartHost, nursery: trio.Nursery) -> None:
    """A place is not taken from somebody who has just come: the host is full instead, and says so."""
    host = await start_host(SMALL)
    nursery.start_soon(ConnectionPruning(host, lambda _: False, 60.0).keep)
    visitors = [await _visit(start_host, host) for _ in range(8)]
    late = await start_host(HostConfig(listen=(), dial_timeout_s=1.0))
    with pytest.raises(PeerUnreachable):
        await late.connect(host.peer_id, host.addrs)
    assert {each.peer_id for each in visitors} == set(host.connected_peers())
