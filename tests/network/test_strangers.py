"""What strangers may do to tables and dials, with real hosts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from p2pinfer.errors import NotDialled
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import HostConfig
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.membership import open_swarm
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.swarm.snapshot import SNAPSHOT_PROTOCOL, encode_response, fetch_snapshot, serve_snapshots
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.routing.announcement import Announcement, encode_announcement
from p2pinfer.routing.config import TableConfig
from p2pinfer.routing.table import SwarmTable

from .support import LOOPBACK, StartHost

REVISION = "ab" * 16
PLACES = 40  # in the tables here


def record(ttl_s: float = 120.0, addrs: tuple[str, ...] = ("/ip4/11.0.0.1/tcp/9",)) -> tuple[str, bytes]:
    """A peer, and what it announces."""
    identity = new_identity()
    said = Announcement(
        identity.peer_id,
        "m",
        REVISION,
        BlockSpan(0, 8),
        "float32",
        900.0,
        1 << 20,
        1,
        addrs=addrs,
        ttl_s=ttl_s,
    )
    return identity.peer_id, seal(identity, encode_announcement(said))


def small_table() -> LiveTable:
    return LiveTable(SwarmTable(TableConfig(max_entries_per_revision=PLACES)))


async def test_a_neighbour_that_invents_peers_empties_no_table(start_host: StartHost) -> None:
    """Neither that of who asks it, nor that of who asks the one that did."""
    evil, near, far = await start_host(), await start_host(), await start_host()
    honest = dict(record() for _ in range(10))
    invented = [record(ttl_s=300.0)[1] for _ in range(2 * PLACES)]
    asked = 0

    async def answer(stream: PeerStream) -> None:
        nonlocal asked
        await receive_value(stream, 1 << 16)
        half = invented[:PLACES] if asked % 2 else invented[PLACES:]
        asked += 1
        await send_value(stream, encode_response([(each, 0.0) for each in half]))

    evil.serve(SNAPSHOT_PROTOCOL, answer)
    tables = small_table(), small_table()
    for table in tables:
        for sealed in honest.values():
            table.take(sealed, told_by="somebody")
    serve_snapshots(near, tables[0])
    await near.connect(evil.peer_id, evil.addrs)
    await far.connect(near.peer_id, near.addrs)
    for _ in range(2):
        await fetch_snapshot(near, tables[0], evil.peer_id, REVISION)
        await fetch_snapshot(far, tables[1], near.peer_id, REVISION)
    for table in tables:
        known = {peer.peer_id for peer in table.live(REVISION)}
        assert len(known) == PLACES
        assert honest.keys() <= known
        newcomer, sealed = record()
        assert table.take(sealed, told_by="another")
        assert newcomer in {peer.peer_id for peer in table.live(REVISION)}


async def test_a_newcomer_hears_of_honest_peers_from_a_neighbour_that_was_deceived(
    start_host: StartHost,
) -> None:
    deceived, newcomer = await start_host(), await start_host()
    table, learned = small_table(), small_table()
    for _ in range(PLACES):
        table.take(record(ttl_s=300.0)[1], told_by="evil")
    honest = dict(record() for _ in range(10))
    for sealed in honest.values():
        table.take(sealed, told_by="somebody")
    serve_snapshots(deceived, table)
    await newcomer.connect(deceived.peer_id, deceived.addrs)
    await fetch_snapshot(newcomer, learned, deceived.peer_id, REVISION)
    first = [each.announcement.peer_id for each in sorted(learned.hearsay(REVISION), key=lambda h: h.number)]
    assert honest.keys() <= set(first[:20])


async def test_what_several_neighbours_say_is_told_from_what_one_says(start_host: StartHost) -> None:
    newcomer, one, other = await start_host(), await start_host(), await start_host()
    learned = LiveTable()
    shared, lonely = record(), record()
    for host, known in ((one, [shared, lonely]), (other, [shared])):
        table = LiveTable()
        for _, sealed in known:
            table.take(sealed)
        serve_snapshots(host, table)
        await newcomer.connect(host.peer_id, host.addrs)
    await fetch_snapshot(newcomer, learned, one.peer_id, REVISION)
    assert await fetch_snapshot(newcomer, learned, other.peer_id, REVISION, confirm=True) == 0
    tellers = {each.announcement.peer_id: each.tellers for each in learned.hearsay(REVISION)}
    assert tellers == {shared[0]: 2, lonely[0]: 1}


async def test_a_node_asks_a_client_for_what_a_successor_says_of_itself(tmp_path: Path) -> None:
    config = replace(LOOPBACK, mdns=False)
    async with open_swarm(new_identity(), config, (), tmp_path / "node") as node:
        client_config = HostConfig(listen=(), mdns=False)
        async with open_swarm(new_identity(), client_config, node.addrs, tmp_path / "client") as client:
            with trio.fail_after(60):
                await client.wait_settled(10)
                peer_id, sealed = record(addrs=("/ip4/11.0.0.7/tcp/9",))
                assert await node.addresses_of(peer_id, REVISION, client.peer_id) == ()
                client._view.take(sealed)  # pyright: ignore[reportPrivateUsage]  # as gossip does
                found = await node.addresses_of(peer_id, REVISION, client.peer_id)
            assert found == ("/ip4/11.0.0.7/tcp/9",)


@pytest.mark.parametrize("address", ["/ip4/169.254.169.254/tcp/80", "/dns4/localhost/tcp/80"])
async def test_a_host_that_is_elsewhere_does_not_dial_into_other_networks(
    address: str, start_host: StartHost
) -> None:
    host = await start_host(HostConfig(listen=()))
    with pytest.raises(NotDialled, match="this host is not in that network"):
        await host.connect(new_identity().peer_id, [address], hearsay=True)
