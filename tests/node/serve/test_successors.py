"""Where a hop looks for the successor that a client names."""

from __future__ import annotations

import pytest

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL, Open, Refused, Relink, Successor
from p2pinfer.node.transport.peer_stream import PeerStream

from ..memory_swarm import MemorySwarm, open_memory_swarm

VICTIM = tuple(f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 17))


async def opening(swarm: MemorySwarm, successor: str) -> FrameStream:
    """A session of a client on the hop, which is told of a successor at the victim's addresses."""
    stream: PeerStream = await swarm.network.host("client").open_stream("hop", SESSION_PROTOCOL)
    frames = FrameStream(stream, max_payload_bytes=0, peer_id="hop")
    named = Successor(successor, VICTIM)
    await frames.send(Open(bytes(16), swarm.spec.revision, 0, 4, 8, "float32", None, named))
    return frames


@pytest.mark.parametrize("known", [(), ("/ip4/198.51.100.1/tcp/4001",)])
async def test_a_hop_dials_its_successor_where_that_says_to_be_and_nowhere_else(
    known: tuple[str, ...], checkpoint: Checkpoint
) -> None:
    asked: list[tuple[str, str]] = []

    async def find(peer_id: str, client_id: str) -> tuple[str, ...]:
        asked.append((peer_id, client_id))
        return known

    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("hop", 0, 4, find_addrs=find)
        frames = await opening(swarm, "invented")
        reply, _ = await frames.receive()
        assert isinstance(reply, Refused)
        assert reply.code == "successor_unreachable"
        assert asked == [("invented", "client")]
        assert swarm.network.dialled == [("hop", "invented", known)]


async def test_a_successor_that_is_connected_is_not_looked_for(checkpoint: Checkpoint) -> None:
    async def find(peer_id: str, client_id: str) -> tuple[str, ...]:
        raise AssertionError("there is a connection")

    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("hop", 0, 4, find_addrs=find)
        swarm.network.host("other")
        reply, _ = await (await opening(swarm, "other")).receive()
        assert isinstance(reply, Refused)  # it serves nothing
        assert swarm.network.dialled == []


async def test_a_successor_that_is_named_later_is_looked_for_in_the_same_way(checkpoint: Checkpoint) -> None:
    async def find(peer_id: str, client_id: str) -> tuple[str, ...]:
        return ()

    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("hop", 0, 4, find_addrs=find)
        await swarm.serve("next", 4, 8)
        stream = await swarm.network.host("client").open_stream("next", SESSION_PROTOCOL)
        following = FrameStream(stream, max_payload_bytes=0, peer_id="next")
        await following.send(Open(bytes(16), swarm.spec.revision, 4, 8, 8, "float32", "hop", None))
        frames = await opening(swarm, "next")
        await frames.receive()
        await frames.send(Relink(1, Successor("invented", VICTIM), 0, 0, 1, 1, False, 1, 1))
        await frames.receive()
        assert swarm.network.dialled == [("hop", "invented", ())]
