"""Members of a gossiping network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host
from p2pinfer.node.swarm.gossip import Gossip
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.transport.identity import Identity
from p2pinfer.routing.announcement import Announcement

REVISION, OTHER = "a" * 32, "b" * 32


@dataclass(frozen=True)
class Member:
    """Somebody who gossips."""

    identity: Identity
    host: Host
    gossip: Gossip
    view: LiveTable

    def announcement(self, sequence: int = 1, revision: str = REVISION) -> Announcement:
        return Announcement(
            self.host.peer_id, "model", revision, BlockSpan(0, 4), "float32", 10.0, 1000, sequence
        )

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until something in the view makes `condition` true."""
        while not condition():
            await self.view.changed.wait()

    async def hears(self, peer: Member, sequence: int, revision: str = REVISION) -> None:
        await self.wait_for(lambda: self.knows(peer, sequence, revision))

    def knows(self, peer: Member, sequence: int, revision: str = REVISION) -> bool:
        live = self.view.live(revision)
        return any(each.peer_id == peer.host.peer_id and each.sequence == sequence for each in live)

    async def connect(self, other: Member) -> None:
        await self.host.connect(other.host.peer_id, other.host.addrs)


Join = Callable[..., Awaitable[Member]]


def watch_forwarding(member: Member, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The records that `member` passes on from here on."""
    passed_on: list[bytes] = []
    publish = member.gossip.pubsub.router.publish

    async def watch(forwarder: ID, message: rpc_pb2.Message) -> None:
        passed_on.append(message.data)
        await publish(forwarder, message)

    monkeypatch.setattr(member.gossip.pubsub.router, "publish", watch)
    return passed_on
