"""What peers do by mistake or on purpose: each ends in a clear line of the log and a host that goes on.

A relay that accepts and then drops, and a clock that is hours off, are in
tests/node/reach/test_relay_reservations.py.
"""

from __future__ import annotations

import logging

import msgspec
import pytest
import trio

from p2pinfer.errors import PeerUnreachable
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import HostConfig
from p2pinfer.node.swarm.bootstrap import BootstrapPeer, Neighbourhood
from p2pinfer.node.swarm.gossip import open_gossip
from p2pinfer.node.swarm.gossipsub import topic_of
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.node.swarm.signed_records import MAX_RECORD_BYTES, seal
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import Announcement, encode_announcement

from .support import ECHO, StartHost, echo

REVISION = "e" * 32
QUIET = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False, upnp=False)


def announcement(peer_id: str, sequence: int, addrs: tuple[str, ...] = ()) -> Announcement:
    return Announcement(
        peer_id, "model", REVISION, BlockSpan(0, 4), "float32", 10.0, 1000, sequence, addrs=addrs
    )


def with_many_addresses(peer_id: str, sequence: int, count: int) -> bytes:
    """An announcement that our own code would not write."""
    fields = msgspec.msgpack.decode(encode_announcement(announcement(peer_id, sequence, ("/the/one",))))
    at = next(index for index, field in enumerate(fields) if field == ["/the/one"])
    fields[at] = [f"/ip4/10.{n >> 8}.{n & 255}.1/tcp/4001" for n in range(count)]
    return msgspec.msgpack.encode(fields)


async def knows(member: SwarmMember, peer_id: str) -> None:
    while all(each.peer_id != peer_id for each in member.announcements(REVISION)):
        await member.table_changed.wait()


async def test_an_address_that_leads_back_here_is_refused_and_dials_nobody_else(
    start_host: StartHost,
) -> None:
    host, other = await start_host(), await start_host()
    here = host.addrs[0].partition("/p2p/")[0]
    stranger = new_identity().peer_id
    with pytest.raises(PeerUnreachable, match="cannot be reached"):
        await host.connect(stranger, [f"{here}/p2p/{stranger}"])
    with pytest.raises(PeerUnreachable, match="this is our own peer id"):
        await host.connect(host.peer_id, host.addrs)
    peers = [BootstrapPeer(host.peer_id, host.addrs), BootstrapPeer(other.peer_id, other.addrs)]
    assert Neighbourhood(host, LiveTable(), peers).has_peers
    other.serve(ECHO, echo)
    async with await host.open_stream(other.peer_id, ECHO, other.addrs) as stream:
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"


async def test_a_peer_with_ten_thousand_addresses_is_left_out(
    start_host: StartHost, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="p2pinfer.node")
    liar_identity, identity = new_identity(), new_identity()
    liar_host, host = await start_host(identity=liar_identity), await start_host(identity=identity)
    view = LiveTable()
    async with (
        open_gossip(liar_host, liar_identity, LiveTable()) as liar,
        open_gossip(host, identity, view) as gossip,
    ):
        await liar.join(REVISION)
        await gossip.join(REVISION)
        await liar_host.connect(host.peer_id, host.addrs)
        while not liar.pubsub.peer_topics.get(topic_of(REVISION)):
            await trio.sleep(0.01)
        record = seal(liar_identity, with_many_addresses(liar_host.peer_id, 1, 10_000))
        assert len(record) > MAX_RECORD_BYTES
        await liar.pubsub.publish(topic_of(REVISION), record)
        while f"{liar_host.peer_id} passes on a record of {len(record)} bytes" not in caplog.text:
            await trio.sleep(0.01)
        shorter = seal(liar_identity, with_many_addresses(liar_host.peer_id, 2, 100))
        await liar.pubsub.publish(topic_of(REVISION), shorter)
        while "gossip.rejected" not in caplog.text:
            await trio.sleep(0.01)
        assert view.everybody() == []
        await liar.announce(announcement(liar_host.peer_id, 3))
        while not view.everybody():
            await view.changed.wait()
