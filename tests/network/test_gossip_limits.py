"""What announcements may cost: forwarders and authors without end, and a full introducer."""

from __future__ import annotations

import logging

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2

from p2pinfer.node.swarm import gossip as module
from p2pinfer.node.swarm import gossipsub
from p2pinfer.node.swarm.gossipsub import FloodingRouter, GuardedPubsub, topic_of
from p2pinfer.node.swarm.proof_gossip import Heard, Notice
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import encode_announcement

from .members import OTHER, REVISION, Join, watch_forwarding


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


async def test_a_forwarder_that_floods_is_read_from_no_faster_than_it_may_send(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out or not, each frame costs something: what is not read waits on its sender's side."""
    monkeypatch.setattr(gossipsub, "NOTICES_AT_ONCE", 3)
    monkeypatch.setattr(gossipsub, "NOTICES_PER_S", 0.0)
    monkeypatch.setattr(gossipsub, "LEFT_OUT_AT_ONCE", 4)
    monkeypatch.setattr(gossipsub, "LEFT_OUT_PER_S", 1e-3)
    alice, bob, carol = await join(), await join(), await join()
    looked_at: list[str] = []
    honest = GuardedPubsub._is_let_in  # pyright: ignore[reportPrivateUsage]

    def look(self: GuardedPubsub, forwarder: str, message: rpc_pb2.Message) -> bool:
        looked_at.append(forwarder)
        return honest(self, forwarder, message)

    monkeypatch.setattr(GuardedPubsub, "_is_let_in", look)
    for each in (alice, carol):
        await each.connect(bob)
        await each.gossip.announce(each.announcement(1))
        await bob.hears(each, 1)
    looked_at.clear()
    for number in range(20):
        await alice.gossip.publish_notice(Notice("proof", REVISION, b"%032d" % number, f"own{number}"))
    await alice.gossip.wait_until_heard()
    await carol.gossip.announce(carol.announcement(2))  # nobody else waits
    await bob.hears(carol, 2)
    assert looked_at.count(alice.identity.peer_id) in (7, 8)  # three let in, four left out, and then no more


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
