"""Bootstrap peers and neighbours: found, lost, replaced."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

import pytest
import trio

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.swarm import bootstrap, retries
from p2pinfer.node.swarm.bootstrap import BootstrapPeer, Neighbourhood
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.snapshot import (
    serve_snapshots,
)
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import Announcement

from ..ports import free_port
from .support import DEAD, StartHost
from .swarms import REVISION, announce, peers

# ---------------------------------------------------------------------- neighbours


def as_bootstrap(host: Host) -> BootstrapPeer:
    return BootstrapPeer(host.peer_id, host.addrs)


async def test_one_bootstrap_peer_that_answers_is_enough(
    start_host: StartHost, nursery: trio.Nursery
) -> None:
    introducer, newcomer = await start_host(), await start_host()
    known, learned = LiveTable(), LiveTable()
    somebody = announce(known)
    serve_snapshots(introducer, known)
    dead = BootstrapPeer(new_identity().peer_id, (DEAD,))
    neighbourhood = Neighbourhood(newcomer, learned, [dead, as_bootstrap(introducer), as_bootstrap(newcomer)])
    assert neighbourhood.has_peers
    nursery.start_soon(neighbourhood.keep)
    await neighbourhood.settled.wait()
    assert peers(learned) == {somebody.peer_id}
    while not neighbourhood.describe_failures():
        await trio.lowlevel.checkpoint()
    assert dead.peer_id in neighbourhood.describe_failures()
    assert "refused" in neighbourhood.describe_failures()


async def test_a_bootstrap_peer_that_comes_late_is_found(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_RETRY_S", 0.01)
    identity = new_identity()
    address = f"/ip4/127.0.0.1/tcp/{free_port()}"
    newcomer = await start_host()
    neighbourhood = Neighbourhood(newcomer, LiveTable(), [BootstrapPeer(identity.peer_id, (address,))])
    nursery.start_soon(neighbourhood.keep)
    while not neighbourhood.describe_failures():
        await trio.lowlevel.checkpoint()
    late = await start_host(HostConfig(listen=(address,)), identity)
    serve_snapshots(late, LiveTable())
    await neighbourhood.settled.wait()
    assert newcomer.connected_peers() == [identity.peer_id]
    assert neighbourhood.describe_failures() == ""


async def test_peers_from_the_table_fill_the_neighbourhood_up(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "CHECK_INTERVAL_S", 0.03)
    monkeypatch.setattr(bootstrap, "NEIGHBOURS", 2)
    view = LiveTable()
    others = [await start_host() for _ in range(3)]
    for other in others:
        serve_snapshots(other, LiveTable())
    me = await start_host()
    send, connected = trio.open_memory_channel[str](3)
    me.when_connected(send.send_nowait)
    nursery.start_soon(Neighbourhood(me, view, []).keep)
    for other in others:
        view.accept(
            Announcement(
                other.peer_id, "m", REVISION, BlockSpan(0, 4), "float32", 1.0, 1, 1, addrs=other.addrs
            ),
            b"",
        )
    assert await connected.receive() != await connected.receive()
    looked = trio.Event()

    def enough() -> list[str]:
        looked.set()
        return [peer.peer_id for peer in others[:2]]

    monkeypatch.setattr(me, "connected_peers", enough)
    await looked.wait()
    with pytest.raises(trio.WouldBlock):
        connected.receive_nowait()


async def test_a_lost_neighbour_is_replaced_at_once(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "CHECK_INTERVAL_S", 1000.0)
    monkeypatch.setattr(retries, "FIRST_RETRY_S", 1000.0)
    monkeypatch.setattr(bootstrap, "STEADY_S", 0.0)
    introducer, newcomer = await start_host(), await start_host()
    serve_snapshots(introducer, LiveTable())
    neighbourhood = Neighbourhood(newcomer, LiveTable(), [as_bootstrap(introducer)])
    nursery.start_soon(neighbourhood.keep)
    await neighbourhood.settled.wait()
    back, came_back = trio.open_memory_channel[str](1)
    introducer.when_connected(back.send_nowait)
    await hang_up(introducer)
    assert await came_back.receive() == newcomer.peer_id


async def hang_up(host: Host) -> None:
    """Have `host` close every connection it has."""
    for connections in list(host.libp2p.get_network().connections.values()):
        for connection in connections:
            await connection.close()


@pytest.mark.parametrize("answers", [True, False])
async def test_a_bootstrap_peer_that_accepts_and_hangs_up_is_dialled_ever_more_slowly(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    delay_s = 0.02
    monkeypatch.setattr(bootstrap, "CHECK_INTERVAL_S", 0.001)
    monkeypatch.setattr(retries, "FIRST_RETRY_S", delay_s)
    introducer, newcomer = await start_host(), await start_host()
    if answers:
        serve_snapshots(introducer, LiveTable())
    tried_at: list[float] = []
    tried, attempts = trio.open_memory_channel[None](100)
    connect = newcomer.connect

    async def count(peer_id: str, addrs: Sequence[str] = (), **more: bool) -> None:
        if addrs:  # not for a stream
            tried_at.append(trio.current_time())
            tried.send_nowait(None)
        await connect(peer_id, addrs, **more)

    monkeypatch.setattr(newcomer, "connect", count)
    neighbourhood = Neighbourhood(newcomer, LiveTable(), [as_bootstrap(introducer)])
    nursery.start_soon(neighbourhood.keep)
    for _ in range(4):
        await attempts.receive()
        if answers:
            await neighbourhood.settled.wait()
        while not (newcomer.connected_peers() and introducer.connected_peers()):
            await trio.lowlevel.checkpoint()
        await hang_up(introducer)
    pauses = [after - before for before, after in pairwise(tried_at)]
    assert all(pause > 0.8 * delay_s * 2**number for number, pause in enumerate(pauses)), pauses
    while introducer.peer_id not in neighbourhood.describe_failures():
        await trio.lowlevel.checkpoint()


async def test_a_neighbour_that_did_not_answer_is_asked_again(
    start_host: StartHost, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "CHECK_INTERVAL_S", 0.03)
    introducer, newcomer = await start_host(), await start_host()
    neighbourhood = Neighbourhood(newcomer, LiveTable(), [as_bootstrap(introducer)])
    send, connected = trio.open_memory_channel[str](1)
    newcomer.when_connected(send.send_nowait)
    nursery.start_soon(neighbourhood.keep)
    await connected.receive()
    serve_snapshots(introducer, LiveTable())
    await neighbourhood.settled.wait()


async def test_nobody_answering_is_said_once_with_the_reasons(
    start_host: StartHost,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(retries, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(retries, "LAST_RETRY_S", 0.004)
    monkeypatch.setattr(retries, "MAX_FAILED", 1)
    lonely = await start_host()
    dead = BootstrapPeer(new_identity().peer_id, (DEAD,))
    attempts, attempted = trio.open_memory_channel[str](0)
    connect = lonely.connect

    async def count(peer_id: str, addrs: Sequence[str] = (), **more: bool) -> None:
        await attempts.send(peer_id)
        await connect(peer_id, addrs, **more)

    monkeypatch.setattr(lonely, "connect", count)
    with caplog.at_level(logging.WARNING, "p2pinfer"):
        nursery.start_soon(Neighbourhood(lonely, LiveTable(), [dead]).keep)
        for _ in range(2 * bootstrap.WARN_AFTER):
            await attempted.receive()
    [record] = caplog.records
    assert dead.peer_id in record.getMessage()
    assert DEAD in record.getMessage()
