"""Floods of well-formed messages among real hosts: the sender waits, and at last is hung up on."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from p2pinfer.errors import PeerError
from p2pinfer.node.concurrency import loop_share
from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.swarm.gossip import Gossip, open_gossip
from p2pinfer.node.swarm.gossipsub import topic_of
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.yamux_frames import HEADER, PING, SYN

from .support import ECHO, LOOPBACK, StartHost, echo

REVISION = "a" * 32
STRICT: HostConfig = replace(LOOPBACK, loop_share=0.01)  # so that a fast computer is flooded, too


@pytest.fixture
def start_gossip(start_host: StartHost, nursery: trio.Nursery) -> Callable[[HostConfig], Awaitable[Any]]:
    """Starts hosts that gossip."""

    async def run(config: HostConfig, task_status: trio.TaskStatus[tuple[Host, Gossip]]) -> None:
        identity = new_identity()
        host = await start_host(config, identity)
        async with open_gossip(host, identity, LiveTable()) as gossip:
            await gossip.join(REVISION)
            task_status.started((host, gossip))
            await trio.sleep_forever()

    async def start(config: HostConfig) -> Any:
        return await nursery.start(run, config)

    return start


async def flood_with_grafts(host: Host, gossip: Gossip, victim: Host) -> None:
    rpc = rpc_pb2.RPC()
    for _ in range(200):
        rpc.control.graft.add().topicID = topic_of(REVISION)
        rpc.control.prune.add(topicID=topic_of(REVISION), backoff=60)
        rpc.subscriptions.add(subscribe=False, topicid=topic_of(REVISION))
        rpc.subscriptions.add(subscribe=True, topicid=topic_of(REVISION))
    while host.connection_kind(victim.peer_id):
        gossip.pubsub.gossipsub.send_rpc(ID.from_base58(victim.peer_id), rpc)
        await trio.sleep(0)


async def flood_with_pings(host: Host, gossip: Gossip, victim: Host) -> None:
    """The muxer answers them; no stream is open and no limit of streams is met."""
    connection: Any = host.libp2p.get_network().connections[ID.from_base58(victim.peer_id)][0]
    frames = b"".join(HEADER.pack(0, PING, SYN, 0, number) for number in range(1000))
    while host.connection_kind(victim.peer_id):
        await connection.muxed_conn.send(frames)


async def flood_with_streams(host: Host, gossip: Gossip, victim: Host) -> None:
    while host.connection_kind(victim.peer_id):
        stream = await host.open_stream(victim.peer_id, ECHO)
        await stream.send_all(b"x" * 1000)
        await stream.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("flood", [flood_with_grafts, flood_with_pings, flood_with_streams])
async def test_who_floods_is_hung_up_on_and_a_neighbour_beside_it_never_waits(
    start_gossip: Callable[[HostConfig], Awaitable[Any]],
    flood: Callable[[Host, Gossip, Host], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_share, "DROP_S", 0.3)
    victim, _ = await start_gossip(STRICT)
    neighbour, _ = await start_gossip(LOOPBACK)
    attacker, gossip = await start_gossip(replace(LOOPBACK, streams_per_s=1e6))
    victim.serve(ECHO, echo)
    for each in (neighbour, attacker):
        await each.connect(victim.peer_id, victim.addrs)
    await trio.sleep(0.2)
    done = False

    def is_refused() -> bool:
        return bool(victim.counts.by_label("refusals").get("overspent"))

    async def attack() -> None:
        nonlocal done
        while not is_refused():  # a busy computer may lose the connection for another reason
            with suppress(PeerError, BaseLibp2pError):  # whichever of its sends meets the end of it
                await attacker.connect(victim.peer_id, victim.addrs)
                await flood(attacker, gossip, victim)
        done = True

    worst = 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attack)
        while not done:
            began = time.thread_time()  # all hosts work in this thread, whatever else the machine does
            assert await neighbour.ping(victim.peer_id) > 0
            worst = max(worst, time.thread_time() - began)
            await trio.sleep(0.05)
    assert neighbour.connection_kind(victim.peer_id) == "direct"
    assert worst < 1
