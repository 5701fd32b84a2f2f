"""Announcements among real hosts: who hears what, and what nobody passes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from libp2p.peer.id import ID

from p2pinfer.errors import PeerError
from p2pinfer.node.swarm import gossip as module
from p2pinfer.node.swarm.gossipsub import topic_of
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import encode_announcement

from .members import OTHER, REVISION, Join, Member, watch_forwarding


async def test_three_members_hear_of_each_other_through_one(join: Join) -> None:
    alice, bob, carol = await join(), await join(), await join()
    await alice.connect(bob)
    await carol.connect(bob)
    for sequence in (1, 2):
        for member in (alice, bob, carol):
            await member.gossip.announce(member.announcement(sequence))
        for member in (alice, bob, carol):
            for other in (alice, bob, carol):
                await member.hears(other, sequence)
    assert bob.gossip.neighbours
    assert set(bob.gossip.neighbours) == {alice.host.peer_id, carol.host.peer_id}


async def test_who_is_kept_out_of_a_neighbours_mesh_is_heard_all_the_same(join: Join) -> None:
    """As is who comes back within a minute, or whose neighbour has as many in its mesh as it likes."""
    alice, bob = await join(), await join()
    topic = topic_of(REVISION)
    bob.gossip.pubsub.gossipsub.back_off[topic] = {ID.from_base58(alice.host.peer_id): 1 << 40}
    alice.gossip.pubsub.gossipsub.back_off[topic] = {ID.from_base58(bob.host.peer_id): 1 << 40}
    await alice.connect(bob)
    for sequence in (1, 2):
        await alice.gossip.announce(alice.announcement(sequence))
        await bob.hears(alice, sequence)
    assert not alice.gossip.pubsub.gossipsub.mesh[topic]


async def test_an_introducer_passes_on_what_its_neighbours_care_about(join: Join) -> None:
    alice, introducer, bob = await join(OTHER), await join(None), await join(OTHER)
    await alice.connect(introducer)
    await bob.connect(introducer)
    await alice.gossip.announce(alice.announcement(revision=OTHER))
    await bob.hears(alice, 1, OTHER)
    await introducer.hears(alice, 1, OTHER)


async def test_an_announcement_made_to_nobody_is_repeated_when_somebody_comes(join: Join) -> None:
    alice, bob = await join(), await join()
    await alice.gossip.announce(alice.announcement())
    await bob.connect(alice)
    await bob.hears(alice, 1)


async def test_a_goodbye_made_to_nobody_is_not_repeated(join: Join) -> None:
    alice, bob = await join(), await join()
    await alice.gossip.announce(alice.announcement())
    await alice.gossip.announce(replace(alice.announcement(2), leaving=True))
    await bob.connect(alice)
    await bob.gossip.announce(bob.announcement())
    await alice.hears(bob, 1)
    assert not bob.view.records()[1:]


async def test_a_goodbye_has_arrived_when_it_returns(join: Join) -> None:
    alice, bob = await join(), await join()
    await bob.connect(alice)
    await alice.gossip.announce(alice.announcement())
    await bob.hears(alice, 1)
    await alice.gossip.announce(replace(alice.announcement(2), leaving=True))
    assert bob.view.live(REVISION) == []


async def test_a_goodbye_to_a_neighbour_that_is_gone_does_not_wait(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = await join(), await join()
    await bob.connect(alice)
    await alice.gossip.announce(alice.announcement())
    await bob.hears(alice, 1)

    async def unreachable(peer_id: str) -> float:
        raise PeerError("gone")

    monkeypatch.setattr(alice.host, "ping", unreachable)
    monkeypatch.setattr(module, "FAREWELL_S", 3600.0)
    with trio.fail_after(60):
        await alice.gossip.announce(replace(alice.announcement(2), leaving=True))


def forged(alice: Member, what: str) -> bytes:
    """A record of Alice's that nobody should believe."""
    match what:
        case "garbage":
            return b"garbage"
        case "no announcement":
            return seal(alice.identity, b"no announcement")
        case "somebody else's":
            return seal(new_identity(), encode_announcement(alice.announcement(9)))
        case "another topic's":
            return seal(alice.identity, encode_announcement(alice.announcement(9, OTHER)))
        case "old":
            return seal(alice.identity, encode_announcement(alice.announcement(1)))
        case _:
            return bytes(20_000)


@pytest.mark.parametrize(
    "what", ["garbage", "no announcement", "somebody else's", "another topic's", "old", "too large"]
)
async def test_what_is_not_true_is_neither_taken_in_nor_passed_on(
    join: Join, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob, carol = await join(), await join(), await join()
    await alice.connect(bob)
    await carol.connect(bob)
    await alice.gossip.announce(alice.announcement(5))
    await carol.hears(alice, 5)
    passed_on = watch_forwarding(bob, monkeypatch)
    record = forged(alice, what)
    await alice.gossip.pubsub.publish(topic_of(REVISION), record)
    await alice.gossip.announce(alice.announcement(6))
    await carol.hears(alice, 6)
    assert len(passed_on) == 1
    assert record not in passed_on
    assert [each.sequence for each in bob.view.live(REVISION)] == [6]


async def test_what_we_know_already_is_still_passed_on_to_those_who_may_not(join: Join) -> None:
    """A neighbour's snapshot may be faster than gossip; it must not cut off those behind us."""
    alice, bob, carol = await join(), await join(), await join()
    await alice.connect(bob)
    await carol.connect(bob)
    announcement = alice.announcement(7)
    bob.view.accept(announcement, seal(alice.identity, encode_announcement(announcement)))
    await alice.gossip.announce(announcement)
    await carol.hears(alice, 7)
