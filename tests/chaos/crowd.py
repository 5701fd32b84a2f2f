"""A crowd that attacks one node with nothing but well-formed messages: a process of its own.

Fifty identities of ten address ranges (127.0.1.0/24 and so on, which on Linux all lead here), five attacks at
once: snapshots that nobody reads, room reserved and never used, grafts and prunes, pings, and words beside
the steps of a session. Whoever is hung up on comes back as somebody else. It goes on until it is killed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2

from p2pinfer.errors import PeerError
from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.host.length_prefix import send_value
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL, Expect, Open, Opened, Probe
from p2pinfer.node.swarm.gossip import open_gossip
from p2pinfer.node.swarm.gossipsub import topic_of
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.snapshot import SNAPSHOT_PROTOCOL
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.node.transport.yamux_frames import HEADER, PING, SYN

RANGES: Final = 10
OF_EACH: Final = 5
TOKENS: Final = 1 << 14  # that each wants to reserve; it takes what fits
BACK_S: Final = 1.0  # before whoever was hung up on comes back


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.crowd")
    parser.add_argument("--peer", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--blocks", type=int, required=True)
    asked = parser.parse_args()
    os.nice(19)  # it stands for machines elsewhere, and shall not take this one's processors
    trio.run(Crowd(asked).run)


class Crowd:
    """All of them."""

    def __init__(self, asked: Any) -> None:
        self._asked = asked

    async def run(self) -> None:
        attacks = (
            self._ask_and_not_read,
            self._reserve_and_not_use,
            self._graft_and_prune,
            self._ping,
            self._probe,
        )
        async with trio.open_nursery() as nursery:
            for number in range(RANGES):
                for place, attack in enumerate(attacks[:OF_EACH]):
                    source = f"127.0.{number + 1}.{place + 1}"
                    nursery.start_soon(self._come_back, source, attack)

    async def _come_back(self, source: str, attack: Callable[[Host, Identity], Awaitable[None]]) -> None:
        while True:
            identity = new_identity()
            try:
                async with open_host(identity, HostConfig(listen=(), upnp=False, mdns=False)) as host:
                    await attack(await self._connected(host, source), identity)
            except* (PeerError, BaseLibp2pError, OSError, trio.ClosedResourceError):
                pass
            await trio.sleep(BACK_S)

    async def _connected(self, host: Host, source: str) -> Host:
        await host.dial_from(self._asked.peer, self._asked.address, (source, 0), responding=False)
        return host

    def _is_connected(self, host: Host) -> bool:
        return host.connection_kind(self._asked.peer) is not None

    async def _ask_and_not_read(self, host: Host, _: Identity) -> None:
        while self._is_connected(host):
            for _each in range(8):
                stream = await host.open_stream(self._asked.peer, SNAPSHOT_PROTOCOL)
                await send_value(stream, msgspec.msgpack.encode([None]))
            await trio.sleep(1)

    async def _open(self, host: Host) -> FrameStream | None:
        """A session for as much as there is, halved until it is granted."""
        asked, tokens = self._asked, TOKENS
        while tokens >= 64:
            stream = await host.open_stream(asked.peer, SESSION_PROTOCOL)
            frames = FrameStream(stream, max_payload_bytes=1 << 20, peer_id=asked.peer)
            await frames.send(Open(os.urandom(16), asked.revision, 0, asked.blocks, tokens, "float32"))
            if isinstance((await frames.receive())[0], Opened):
                return frames
            tokens //= 2
        return None

    async def _reserve_and_not_use(self, host: Host, identity: Identity) -> None:
        while self._is_connected(host):
            frames = await self._open(host)
            while frames is not None:
                await frames.send(Expect(identity.peer_id))
                await trio.sleep(3)
            await trio.sleep(1)

    async def _probe(self, host: Host, _: Identity) -> None:
        frames = await self._open(host)
        while frames is not None:
            for number in range(100):
                await frames.send(Probe(number))
            await trio.sleep(0.01)

    async def _graft_and_prune(self, host: Host, identity: Identity) -> None:
        topic, rpc = topic_of(self._asked.revision), rpc_pb2.RPC()
        for _each in range(250):
            rpc.control.graft.add().topicID = topic
            rpc.control.prune.add(topicID=topic, backoff=60)
        async with open_gossip(host, identity, LiveTable()) as gossip:
            await gossip.join(self._asked.revision)
            await gossip.pubsub.ensure_peer_stream(ID.from_base58(self._asked.peer))
            while self._is_connected(host):
                gossip.pubsub.gossipsub.send_rpc(ID.from_base58(self._asked.peer), rpc)
                await trio.sleep(0.01)

    async def _ping(self, host: Host, _: Identity) -> None:
        frames = b"".join(HEADER.pack(0, PING, SYN, 0, number) for number in range(1000))
        connection: Any = host.libp2p.get_network().connections[ID.from_base58(self._asked.peer)][0]
        while self._is_connected(host):
            await connection.muxed_conn.send(frames)
            await trio.sleep(0.01)


if __name__ == "__main__":
    main()
