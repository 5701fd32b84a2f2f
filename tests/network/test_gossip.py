"""Announcements among real hosts: who hears what, and what nobody passes on."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2

from p2pinfer.errors import PeerError
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host
from p2pinfer.node.swarm import gossip as module
from p2pinfer.node.swarm import gossipsub
from p2pinfer.node.swarm.gossip import Gossip, open_gossip
from p2pinfer.node.swarm.gossipsub import FloodingRouter, topic_of
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.proof_gossip import Heard, Notice
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.routing.announcement import Announcement, encode_announcement

from .support import StartHost

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


@pytest.fixture
async def join(start_host: StartHost, nursery: trio.Nursery) -> Join:
    """Starts members that end with the test; those with a revision are in its topic."""

    async def run(
        member_of: str | None, task_status: trio.TaskStatus[Member] = trio.TASK_STATUS_IGNORED
    ) -> None:
        identity, view = new_identity(), LiveTable()
        host = await start_host(identity=identity)
        async with open_gossip(host, identity, view) as gossip:
            if member_of is not None:
                await gossip.join(member_of)
                await gossip.join(member_of)
            task_status.started(Member(identity, host, gossip, view))
            if member_of is None:
                await gossip.follow_neighbours()
            await trio.sleep_forever()

    async def start(revision: str | None = REVISION) -> Member:
        member: Member = await nursery.start(run, revision)
        return member

    return start


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
    with trio.fail_after(module.FAREWELL_S):
        await alice.gossip.announce(replace(alice.announcement(2), leaving=True))


def watch_forwarding(member: Member, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The records that `member` passes on from here on."""
    passed_on: list[bytes] = []
    publish = member.gossip.pubsub.router.publish

    async def watch(forwarder: ID, message: rpc_pb2.Message) -> None:
        passed_on.append(message.data)
        await publish(forwarder, message)

    monkeypatch.setattr(member.gossip.pubsub.router, "publish", watch)
    return passed_on


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


async def test_an_author_who_announces_without_end_is_not_passed_on(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PUBLISHES_AT_ONCE", 3)
    monkeypatch.setattr(module, "PUBLISHES_PER_S", 0.0)
    alice, bob = await join(), await join()
    await alice.connect(bob)
    await alice.gossip.announce(alice.announcement(1))
    await bob.hears(alice, 1)
    for sequence in (2, 3):
        await alice.gossip.announce(alice.announcement(sequence))
        await bob.hears(alice, sequence)
    await alice.gossip.announce(alice.announcement(4))
    await alice.gossip.wait_until_heard()
    assert bob.knows(alice, 3)


async def test_who_repeats_an_author_s_record_neither_silences_it_nor_is_passed_on(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PUBLISHES_AT_ONCE", 2)
    monkeypatch.setattr(module, "PUBLISHES_PER_S", 0.0)
    alice, bob, carol, mallory = await join(), await join(), await join(), await join()
    for member in (alice, carol, mallory):
        await member.connect(bob)
    while len(bob.gossip.pubsub.gossipsub.mesh[topic_of(REVISION)]) < 3:  # until then news may be lost
        await trio.sleep(0.01)
    await alice.gossip.announce(alice.announcement(1))
    for member in (bob, carol, mallory):
        await member.hears(alice, 1)
    passed_on = watch_forwarding(bob, monkeypatch)
    record = seal(alice.identity, encode_announcement(alice.announcement(1)))
    for _ in range(20):
        await mallory.gossip.pubsub.publish(topic_of(REVISION), record)
    await mallory.gossip.wait_until_heard()
    await alice.gossip.announce(alice.announcement(2))
    await carol.hears(alice, 2)
    assert len(passed_on) == 1


async def test_news_is_not_passed_on_twice_even_for_its_author(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PUBLISHES_AT_ONCE", 3)
    monkeypatch.setattr(module, "PUBLISHES_PER_S", 0.0)
    monkeypatch.setattr(module, "MAX_TOLD", 1)
    alice, bob, carol = await join(), await join(), await join()
    await alice.connect(bob)
    await carol.connect(bob)
    await carol.gossip.announce(carol.announcement(1))
    await alice.hears(carol, 1)
    await alice.gossip.announce(alice.announcement(1))
    await carol.hears(alice, 1)
    passed_on = watch_forwarding(bob, monkeypatch)
    for _ in range(5):
        await alice.gossip.announce(alice.announcement(1))
    await alice.gossip.announce(alice.announcement(2))
    await carol.hears(alice, 2)
    assert len(passed_on) == 1


async def test_a_forwarder_who_sends_without_end_is_cut_short(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gossipsub, "FORWARDS_AT_ONCE", 3)
    monkeypatch.setattr(gossipsub, "FORWARDS_PER_S", 0.0)
    alice, bob = await join(), await join()
    await alice.connect(bob)
    await alice.gossip.announce(alice.announcement(1))
    await bob.hears(alice, 1)
    for _ in range(3):
        await alice.gossip.pubsub.publish(topic_of(REVISION), b"garbage")
    await alice.gossip.announce(alice.announcement(2))
    await alice.gossip.wait_until_heard()
    assert bob.knows(alice, 1)


async def test_a_forwarder_of_many_notices_of_proofs_is_cut_short_and_its_announcements_are_not(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gossipsub, "NOTICES_AT_ONCE", 3)
    monkeypatch.setattr(gossipsub, "NOTICES_PER_S", 0.0)
    monkeypatch.setattr(module, "PROOFS_AT_ONCE", 100)
    alice, bob = await join(), await join()
    heard: list[str] = []

    def hear(notice: Heard) -> bool:
        heard.append(notice.notice.accused)
        return True

    bob.gossip.on_notice = hear
    await alice.connect(bob)
    await alice.gossip.announce(alice.announcement(1))
    await bob.hears(alice, 1)
    for number in range(9):
        await alice.gossip.publish_notice(Notice("proof", REVISION, b"%032d" % number, f"own{number}"))
    await alice.gossip.announce(alice.announcement(2))
    await bob.hears(alice, 2)
    assert heard == ["own0", "own1", "own2"]


async def test_an_introducer_follows_a_bounded_number_and_drops_what_nobody_needs(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FOLLOWED", 1)
    introducer = await join(None)
    alice, bob = await join(OTHER), await join(REVISION)
    await alice.connect(introducer)
    await alice.gossip.announce(alice.announcement(1, OTHER))
    await introducer.hears(alice, 1, OTHER)
    await bob.connect(introducer)
    await bob.gossip.announce(bob.announcement(1))
    await bob.gossip.wait_until_heard()
    assert not introducer.knows(bob, 1)
    await alice.gossip.pubsub.unsubscribe(topic_of(OTHER))
    sequence = 1
    while not introducer.knows(bob, sequence):
        sequence += 1
        await bob.gossip.announce(bob.announcement(sequence))
        with trio.move_on_after(0.3):
            await introducer.hears(bob, sequence)


async def test_one_neighbour_cannot_fill_an_introducer_up(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gossipsub, "MAX_SUBSCRIPTIONS", 20)
    introducer, stranger = await join(None), await join(None)
    invented = [f"{number:032x}" for number in range(64)]
    for revision in invented:
        await stranger.gossip.join(revision)
    await stranger.gossip.pubsub.subscribe("/another/topic")
    await stranger.connect(introducer)
    await stranger.gossip.announce(stranger.announcement(1, invented[0]))
    await introducer.hears(stranger, 1, invented[0])
    alice, bob = await join(OTHER), await join(OTHER)
    await alice.connect(introducer)
    await bob.connect(introducer)
    await alice.gossip.announce(alice.announcement(1, OTHER))
    await bob.hears(alice, 1, OTHER)
    followed = set(introducer.gossip.pubsub.topic_ids)
    assert topic_of(OTHER) in followed
    assert len(followed) == module.MAX_FOLLOWED_FOR_ONE + 1
    remembered = [topic for topic in introducer.gossip.pubsub.peer_topics if topic != topic_of(OTHER)]
    assert len(remembered) == 20
    assert "/another/topic" not in remembered


async def test_a_full_introducer_prefers_topics_with_more_neighbours(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FOLLOWED", 1)
    introducer, stranger = await join(None), await join(REVISION)
    await stranger.connect(introducer)
    await stranger.gossip.announce(stranger.announcement(1))
    await introducer.hears(stranger, 1)
    alice, bob = await join(OTHER), await join(OTHER)
    await alice.connect(introducer)
    await bob.connect(introducer)
    await alice.gossip.announce(alice.announcement(1, OTHER))
    await bob.hears(alice, 1, OTHER)
    assert set(introducer.gossip.pubsub.topic_ids) == {topic_of(OTHER)}


async def test_a_message_that_makes_libp2p_raise_ends_nothing(join: Join) -> None:
    """A public key that cannot be parsed raises out of libp2p's signature check, in a task of ours."""
    alice, bob = await join(), await join()
    await alice.connect(bob)
    await alice.gossip.announce(alice.announcement(1))
    await bob.hears(alice, 1)
    hostile = rpc_pb2.Message(
        data=b"x",
        topicIDs=[topic_of(REVISION)],
        from_id=b"\x12\x20" + bytes(32),
        seqno=b"1",
        key=b"\x08\x07",
        signature=b"x",
    )
    [queue] = alice.gossip.pubsub.peer_queues.values()
    queue.push(rpc_pb2.RPC(publish=[hostile]))
    await alice.gossip.announce(alice.announcement(2))
    await bob.hears(alice, 2)


async def test_a_failing_heartbeat_is_logged_and_goes_on(
    join: Join, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beaten = trio.Event()
    heartbeat = GossipSub.heartbeat
    failures = iter([KeyError("a bug")])

    async def fail_once(self: GossipSub) -> None:
        for failure in failures:
            self.heartbeat_interval = 0
            raise failure
        beaten.set()
        await heartbeat(self)

    async def fail(self: GossipSub, *_: object) -> None:
        raise KeyError("another")

    monkeypatch.setattr(GossipSub, "heartbeat", fail_once)
    monkeypatch.setattr(GossipSub, "on_peer_subscribed", fail)
    monkeypatch.setattr(GossipSub, "flush_pending_messages", fail)
    alice, bob = await join(), await join()
    await beaten.wait()
    await alice.connect(bob)
    await alice.gossip.announce(alice.announcement(1))
    await bob.hears(alice, 1)
    assert "a heartbeat of gossip failed" in caplog.text
    assert all(record.levelno < logging.ERROR or "heartbeat" in record.message for record in caplog.records)


async def test_a_topic_that_is_entered_while_a_neighbour_is_greeted_is_told_to_it(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libp2p's greeting has the topics of when it was begun; others are told to those already greeted."""
    introducer, alice = await join(None), await join(REVISION)
    pubsub_of_introducer, router = introducer.gossip.pubsub, introducer.gossip.pubsub.gossipsub
    unread = await pubsub_of_introducer.subscribe("/another/topic")

    def enter_and_add(peer_id: ID, protocol_id: TProtocol | None) -> None:
        pubsub_of_introducer.subscribed_topics_receive[topic_of(OTHER)] = unread
        FloodingRouter.add_peer(router, peer_id, protocol_id)

    monkeypatch.setattr(router, "add_peer", enter_and_add)
    await alice.connect(introducer)
    known = alice.gossip.pubsub.peer_topics
    while ID.from_base58(introducer.host.peer_id) not in known.get(topic_of(OTHER), ()):
        await trio.sleep(0.01)


async def test_a_neighbour_that_a_full_mesh_let_go_is_not_grafted_again_at_once(join: Join) -> None:
    """Many come, the mesh is full, many leave: who was pruned would take a graft for a flood."""
    member, topic = await join(), topic_of(REVISION)
    router = member.gossip.pubsub.gossipsub
    neighbours = {ID.from_base58(new_identity().peer_id) for _ in range(router.degree_high + 1)}
    for peer_id in neighbours:
        router.add_peer(peer_id, TProtocol("/meshsub/1.2.0"))
    member.gossip.pubsub.peer_topics[topic] = set(neighbours)
    router.mesh[topic] = set(neighbours)
    _, prunes = router.mesh_heartbeat()
    pruned = set(prunes)
    assert len(pruned) == len(neighbours) - router.degree
    member.gossip.pubsub.peer_topics[topic] = set(pruned)
    router.mesh[topic] = set()
    grafts, _ = router.mesh_heartbeat()
    assert not grafts
    member.gossip.pubsub.peer_topics[topic].clear()
