"""js-libp2p, which nobody of p2pinfer wrote: it connects, relays for us and through us, and hears us."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.reach.circuit import reserve, serve_circuits
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.reach.relay_server import Relay
from p2pinfer.node.swarm.gossipsub import topic_of
from p2pinfer.node.swarm.live_table import open_announcement
from p2pinfer.node.swarm.membership import SwarmMember, open_swarm
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.routing.announcement import Announcement

from .javascript import JavaScriptPeer, open_peer

pytestmark = pytest.mark.slow

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ECHO = "/interop/echo/1.0.0"
REVISION = "d" * 32
LIMIT_S = 60.0
UNLIMITED = RelayConfig(bytes_per_s=1e9, bytes_per_s_per_peer=1e9)  # its rate is not the question here
BYTES = 3_000_000  # beyond the largest window of either side, so both have to grant more of it


@asynccontextmanager
async def our_host(*listen: str, relays: bool = False) -> AsyncGenerator[Host]:
    """A host of ours that echoes, lets relays connect others with it, and relays if asked to."""

    async def echo(stream: PeerStream) -> None:
        while received := await stream.receive_some():
            await stream.send_all(received)

    async def ignore(peer_id: str) -> None:
        await trio.sleep_forever()

    with trio.fail_after(LIMIT_S):
        async with open_host(new_identity(), HostConfig(listen=listen)) as host:
            host.serve(ECHO, echo)
            serve_circuits(host, ignore)
            if relays:
                Relay(host, UNLIMITED, lambda stream: True).register()
            yield host


async def echoed(host: Host, peer_id: str, addrs: tuple[str, ...]) -> bool:
    """Whether a stream to the peer brings back what was sent; returns whether it was relayed."""
    sent = bytes(range(256)) * (BYTES // 256)
    received = bytearray()
    async with await host.open_stream(peer_id, ECHO, addrs) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, sent)
        while len(received) < len(sent):
            piece = await stream.receive_some()
            assert piece, f"the stream ended after {len(received)} bytes"
            received += piece
        assert received == sent
        return stream.is_relayed


async def test_it_connects_identifies_us_and_answers(javascript: tuple[Path, str]) -> None:
    async with our_host(LOOPBACK) as host, open_peer(javascript) as peer:
        dialled = await peer.do("dial", addr=host.addrs[0])
        assert dialled["peer_id"] == host.peer_id
        assert (dialled["encryption"], dialled["muxer"]) == ("/noise", "/yamux/1.0.0")
        identified = await peer.do("identified", peer=host.peer_id)
        assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", ECHO} <= set(identified["protocols"])
        assert host.direct_addrs[0].removesuffix(f"/p2p/{host.peer_id}") in identified["addrs"]
        assert (await peer.do("ping", peer=host.peer_id))["ms"] < LIMIT_S * 1e3
        assert peer.peer_id in host.connected_peers()
        assert await host.ping(peer.peer_id) < LIMIT_S


async def test_streams_carry_more_than_a_window_either_way(javascript: tuple[Path, str]) -> None:
    async with our_host(LOOPBACK) as host, open_peer(javascript, listen=(LOOPBACK,)) as peer:
        assert await echoed(host, peer.peer_id, (await peer.address(),)) is False
        answer = await peer.do("exchange", peer=host.peer_id, protocol=ECHO, bytes=BYTES)
        assert (answer["count"], answer["same"]) == (BYTES, True)


async def test_it_relays_for_us(javascript: tuple[Path, str]) -> None:
    async with (
        open_peer(javascript, listen=(LOOPBACK,), relay=True) as relay,
        our_host() as private,
        our_host() as client,
    ):
        address = await relay.address()
        await private.connect(relay.peer_id, [address])
        granted = await reserve(private, relay.peer_id)
        assert 60 < granted.expires_s < 86_400
        private.be_reached_through([address])
        assert await echoed(client, private.peer_id, private.addrs) is True


async def reserved_at(relay: Host, peer: JavaScriptPeer) -> str:
    """The address of a JavaScript peer that has asked `relay` to be reached through it."""
    address = await peer.address("/p2p-circuit")
    assert address == f"{relay.addrs[0]}/p2p-circuit/p2p/{peer.peer_id}"
    return address


async def test_it_is_reached_through_our_relay_by_us_and_by_its_own(javascript: tuple[Path, str]) -> None:
    async with our_host(LOOPBACK, relays=True) as relay, our_host() as client:
        through_us = f"{relay.addrs[0]}/p2p-circuit"
        async with open_peer(javascript, listen=(through_us,)) as private, open_peer(javascript) as other:
            address = await reserved_at(relay, private)
            assert await echoed(client, private.peer_id, (address,)) is True
            assert (await other.do("dial", addr=address))["relayed"] is True
            answer = await other.do("exchange", peer=private.peer_id, protocol=ECHO, bytes=BYTES)
            assert (answer["count"], answer["same"]) == (BYTES, True)


async def test_it_reaches_a_node_of_ours_through_our_relay(javascript: tuple[Path, str]) -> None:
    async with our_host(LOOPBACK, relays=True) as relay, our_host() as private:
        await private.connect(relay.peer_id, relay.addrs)
        await reserve(private, relay.peer_id)
        private.be_reached_through(relay.addrs[:1])
        async with open_peer(javascript) as peer:
            assert (await peer.do("dial", addr=private.addrs[0]))["relayed"] is True
            answer = await peer.do("exchange", peer=private.peer_id, protocol=ECHO, bytes=BYTES)
            assert (answer["count"], answer["same"]) == (BYTES, True)


def announcement(member: SwarmMember, sequence: int) -> Announcement:
    return Announcement(
        member.peer_id,
        "model",
        REVISION,
        BlockSpan(0, 4),
        "float32",
        10.0,
        1000,
        sequence,
        addrs=member.addrs,
    )


async def test_it_hears_our_signed_announcements(javascript: tuple[Path, str], tmp_path: Path) -> None:
    config = HostConfig(listen=(LOOPBACK,), mdns=False, upnp=False)
    with trio.fail_after(LIMIT_S):
        async with (
            open_swarm(new_identity(), config, (), tmp_path) as introducer,
            open_peer(javascript) as peer,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(introducer.follow_neighbours)
            await peer.do("subscribe", topic=topic_of(REVISION))
            await peer.do("dial", addr=introducer.addrs[0])
            async with open_swarm(new_identity(), config, introducer.addrs, tmp_path) as node:
                await node.join(REVISION)
                assert await node.wait_settled(LIMIT_S)
                await node.announce(announcement(node, 1))
                message = await peer.events.receive()
                assert (message["topic"], message["signing"]) == (topic_of(REVISION), "signed")
                assert message["from"] == message["author"] == node.peer_id
                assert message["valid"] is True
                assert open_announcement(bytes.fromhex(message["record"])) == announcement(node, 1)
            nursery.cancel_scope.cancel()
