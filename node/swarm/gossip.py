"""Announcements over GossipSub: one topic per model revision, with validation before forwarding.

Every record is opened in the topic's validator, so a bad one is neither taken in nor forwarded. Neither is
one that somebody else than its author published, or that is no news: who repeats what a peer said reaches
nobody, and uses up nothing that is the peer's. How much a neighbour may forward is limited before a signature
is looked at, how often an author may bring news after that.

Everybody is also in one topic of all models, where a few peers of each announce themselves: whoever serves
one model so hears of those who serve another, keeps a few of them, and introduces newcomers to them. Who does
is drawn, so that the topic carries about `MODELS_PER_S` announcements a second however many peers and models
there are. That a few have spoken silences nobody, since they may have been invented for that.

An introducer, which holds no model, follows the topics its neighbours are in: a mesh forwards only what its
members subscribe to, and newcomers know nobody but the introducer. It follows `MAX_FOLLOWED` of them, those
with the most neighbours in them, and `MAX_FOLLOWED_FOR_ONE` for the sake of any one neighbour.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final, cast

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12
from libp2p.pubsub.pb import rpc_pb2
from libp2p.tools.anyio_service import background_trio_service

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.identity import Identity
from p2pinfer.recent import Recent
from p2pinfer.routing.announcement import Announcement

from .gossipsub import MODELS_TOPIC, TOPIC, FloodingRouter, GuardedPubsub, topic_of
from .live_table import LiveTable, announcement_by
from .proof_gossip import Heard, Notice, decode_notice, encode_notice, is_notice
from .signed_records import open_record, seal

logger = logging.getLogger(__name__)

MAX_FOLLOWED: Final = 64
MAX_FOLLOWED_FOR_ONE: Final = 4  # a node is in one topic; who is in many may have invented them
PUBLISHES_PER_S: Final = 0.5  # announcements of one author; one a minute, or five seconds apart, is usual
PUBLISHES_AT_ONCE: Final = 6
MODELS_PER_S: Final = 1.0  # announcements of all models in the topic that everybody is in
MODELS_EACH: Final = 4  # of one model, in MODELS_INTERVAL_S, where there are few models
MODELS_EACH_AT_LEAST: Final = 2  # where there are many: with fewer, a model would be forgotten now and then
MODELS_INTERVAL_S: Final = 60.0
MODELS_GAP_S: Final = 20.0  # between two of one peer
MODELS_BY_ONE_PER_S: Final = 1 / 15
MODELS_BY_ONE_AT_ONCE: Final = 4
MAX_TOLD: Final = 4096  # authors whose last news is remembered
TOLD_S: Final = 900.0  # for how long; a table remembers no record longer than that
FAREWELL_S: Final = 1.0  # how long a goodbye may take to reach the neighbours
FAREWELL_GRACE_S: Final = 0.1  # between reaching a neighbour and being understood by it
PROOFS_PER_S: Final = 1 / 30  # notices of proofs by one author
PROOFS_AT_ONCE: Final = 4


class Gossip:
    """Hears and tells who serves what. Made by `open_gossip`."""

    def __init__(self, host: Host, pubsub: GuardedPubsub, identity: Identity, view: LiveTable) -> None:
        self.pubsub = pubsub
        self._host = host
        self._identity = identity
        self._view = view
        self._joined: set[str] = set()
        self._followed: set[str] = set()  # those of them that only neighbours care about
        self._unheard: dict[str, bytes] = {}  # topic -> our last record, if nobody was there to hear it
        # author, revision, whether in the topic of all models -> last sequence, when
        self._told = Recent[tuple[str, str, bool], tuple[int, float]](MAX_TOLD)
        self._spoke: dict[str, float] = {}  # revision -> when we announced it in the topic of all models
        self._rng = random.Random()
        self._introductions = RateLimit(MODELS_BY_ONE_PER_S, MODELS_BY_ONE_AT_ONCE)
        self._publishes = RateLimit(PUBLISHES_PER_S, PUBLISHES_AT_ONCE)
        self._notices = RateLimit(PROOFS_PER_S, PROOFS_AT_ONCE)
        self.on_notice: Callable[[Heard], bool] = lambda _: False  # whether others should get it
        self._changed = Pulse()  # a neighbour entered a topic, or our mesh
        pubsub.gossipsub.on_change = self._note_change

    @property
    def neighbours(self) -> list[str]:
        """The peers we gossip with."""
        return [str(peer) for peer in self.pubsub.peers]

    @property
    def revisions(self) -> frozenset[str]:
        """The models whose announcements we hear for our own sake."""
        return frozenset(self._joined - self._followed)

    def topic_peers(self, revision: str) -> set[str]:
        """The peers that we gossip with about `revision`."""
        return {str(peer) for peer in self.pubsub.peer_topics.get(topic_of(revision), set())}

    async def join_all_models(self) -> None:
        """Hear of a few peers of every model, and pass on what is told of them."""
        self.pubsub.set_topic_validator(MODELS_TOPIC, self._validator(None), False)
        await self.pubsub.subscribe(MODELS_TOPIC)

    async def join(self, revision: str) -> None:
        """Hear of everybody who serves `revision`; harmless twice."""
        self._followed.discard(revision)
        if revision not in self._joined:
            await self._subscribe(revision)

    async def _subscribe(self, revision: str) -> None:
        self._joined.add(revision)
        topic = topic_of(revision)
        self.pubsub.set_topic_validator(topic, self._validator(revision), False)
        await self.pubsub.subscribe(topic)

    def _validator(self, revision: str | None) -> Callable[[ID, rpc_pb2.Message], bool]:
        """Says whether a message about `revision` is worth passing on; None: about any."""

        def is_worth_passing_on(forwarder: ID, message: rpc_pb2.Message) -> bool:
            return forwarder == self.pubsub.my_id or self._take(str(forwarder), message, revision)

        return is_worth_passing_on

    async def publish_notice(self, notice: Notice) -> bytes:
        """Tell everybody in the topic of a proof that we hold; returns the record that they get."""
        record = seal(self._identity, encode_notice(notice))
        await self.pubsub.publish(topic_of(notice.revision), record)
        return record

    async def announce(self, announcement: Announcement) -> None:
        """Tell everybody in the topic; a goodbye has reached the neighbours when this returns."""
        record = self._view.publish(self._identity, announcement)
        await self._publish(topic_of(announcement.revision), record, announcement.leaving)
        if self._is_our_turn(announcement):
            self._spoke[announcement.revision] = trio.current_time()
            await self._publish(MODELS_TOPIC, record, announcement.leaving)
        if announcement.leaving:
            with trio.move_on_after(FAREWELL_S):
                await self.wait_until_heard()

    async def _publish(self, topic: str, record: bytes, leaving: bool) -> None:
        self._unheard.pop(topic, None)
        if self._is_heard(topic):
            await self.pubsub.publish(topic, record)
        elif not leaving:
            self._unheard[topic] = record

    def _is_our_turn(self, announcement: Announcement) -> bool:
        """True if this announcement is also one for the topic of all models."""
        if MODELS_TOPIC not in self.pubsub.topic_ids:
            return False
        since_s = trio.current_time() - self._spoke.get(announcement.revision, -TOLD_S)
        if announcement.leaving:  # to be taken back where it was said
            return since_s < announcement.ttl_s
        models = self._view.models()
        peers = len(models.get(announcement.revision, ()))
        return since_s >= MODELS_GAP_S and self._rng.random() < models_share(len(models), peers)

    async def follow_neighbours(self) -> None:
        """Join whatever topics of ours the neighbours are in, until cancelled."""
        while True:
            changed = self._changed.next
            wanted = self._wanted()
            for revision in [each for each in wanted if each not in self._joined]:
                if len(self._followed) >= MAX_FOLLOWED:
                    await self._unsubscribe_one(self._followed.difference(wanted))
                self._followed.add(revision)
                await self._subscribe(revision)
            await changed.wait()

    def _wanted(self) -> list[str]:
        """The revisions to follow, those with the most neighbours in them first."""
        subscribers = {
            match[1]: peers
            for topic, peers in self.pubsub.peer_topics.items()
            if (match := TOPIC.fullmatch(topic)) and match[1] not in self._joined - self._followed
        }

        def rank(revision: str) -> tuple[int, bool, str]:
            # What is followed already comes first of equals, so that no stranger's topic takes its place.
            return -len(subscribers[revision]), revision not in self._followed, revision

        wanted: list[str] = []
        followed_for = Counter[ID]()
        for revision in sorted(subscribers, key=rank):
            if any(followed_for[peer] < MAX_FOLLOWED_FOR_ONE for peer in subscribers[revision]):
                followed_for.update(subscribers[revision])
                wanted.append(revision)
        return wanted[:MAX_FOLLOWED]

    async def repeat_unheard(self) -> None:
        """Announce again what nobody was there to hear, as soon as somebody is; until cancelled."""
        while True:
            changed = self._changed.next
            for topic in filter(self._is_heard, list(self._unheard)):
                await self.pubsub.publish(topic, self._unheard.pop(topic))
            await changed.wait()

    def _is_heard(self, topic: str) -> bool:
        """True if there is a neighbour to hear what we publish."""
        return not self.pubsub.peer_topics.get(topic, set()).isdisjoint(self.pubsub.peers)

    async def _unsubscribe_one(self, revisions: Iterable[str]) -> None:
        for revision in sorted(revisions)[:1]:
            self._followed.remove(revision)
            self._joined.remove(revision)
            self.pubsub.remove_topic_validator(topic_of(revision))
            await self.pubsub.unsubscribe(topic_of(revision))

    def _take(self, forwarder: str, message: rpc_pb2.Message, revision: str | None) -> bool:
        """Take in the record in a message of that model's topic, or of all models' (None); whether others
        should get it."""
        try:
            author, payload = open_record(message.data)
            # A message is signed by who published it, so nobody can spend another author's rate.
            if str(ID(message.from_id)) != author:
                raise ProtocolViolation("a record that somebody else published")
            if is_notice(payload):
                heard = Heard(decode_notice(payload), author, message.data, forwarder)
                return self._take_notice(heard, revision)
            announcement = announcement_by(author, payload)
            if revision is not None and announcement.revision != revision:
                raise ProtocolViolation("an announcement of another model than its topic's")
            if not self._is_news(announcement, revision is None):
                raise ProtocolViolation("an announcement that was heard before")
            rate = self._introductions if revision is None else self._publishes
            if not rate.take(announcement.peer_id, trio.current_time()):
                raise ProtocolViolation(f"{announcement.peer_id} announces too often")
            self._note_told(announcement, revision is None)
            news = self._view.accept(announcement, message.data, told_by=forwarder)
            return news or self._view.knows(announcement)
        except ProtocolViolation as exc:
            logger.debug("gossip.rejected forwarder=%s why=%s", forwarder, exc)
            return False

    def _take_notice(self, heard: Heard, revision: str | None) -> bool:
        if heard.notice.revision != revision:
            raise ProtocolViolation("a notice about another model than its topic's")
        if not self._notices.take(heard.author, trio.current_time()):
            raise ProtocolViolation(f"{heard.author} accuses too often")
        return self.on_notice(heard)

    def _is_news(self, announcement: Announcement, of_all_models: bool) -> bool:
        """True if its topic has not brought it yet, and nothing later is known.

        What only a snapshot has brought is news: those behind us may not have asked for one.
        """
        author = announcement.peer_id, announcement.revision, of_all_models
        told, told_at = self._told.get(author, (-1, 0.0))
        was_told = announcement.sequence <= told and trio.current_time() < told_at + TOLD_S
        return not was_told and not self._view.outdates(announcement)

    def _note_told(self, announcement: Announcement, of_all_models: bool) -> None:
        author = announcement.peer_id, announcement.revision, of_all_models
        self._told[author] = announcement.sequence, trio.current_time()

    def _note_change(self) -> None:
        self._changed.fire()

    async def wait_until_heard(self) -> None:
        """Wait until all that was published has reached the peers we are connected to.

        Connections are read in order, so who answers a ping sent after a message has that message, and only
        needs a moment to look at it.
        """
        while any(len(queue) for queue in self.pubsub.peer_queues.values()):
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            for peer_id in self.neighbours:
                nursery.start_soon(self._ping_quietly, peer_id)
        await trio.sleep(FAREWELL_GRACE_S)

    async def _ping_quietly(self, peer_id: str) -> None:
        try:
            await self._host.ping(peer_id)
        except PeerError as exc:
            logger.debug("gossip.farewell_unheard peer=%s why=%s", peer_id, exc)


def models_share(models: int, peers: int) -> float:
    """The share of a peer's announcements that are made in the topic of all models.

    Args:
        models: How many are known.
        peers: Those of the peer's own model that are known, itself included.
    """
    each = min(MODELS_EACH, max(MODELS_EACH_AT_LEAST, MODELS_PER_S * MODELS_INTERVAL_S / max(models, 1)))
    return each / max(peers, 1)


@asynccontextmanager
async def open_gossip(host: Host, identity: Identity, view: LiveTable) -> AsyncGenerator[Gossip]:
    """Gossip over `host` until the block ends. To be opened before the host connects to anybody."""
    router = FloodingRouter(
        protocols=[PROTOCOL_ID_V12, PROTOCOL_ID_V11],
        degree=4,  # a copy from each of the mesh costs more than a table compared a little later
        degree_low=3,
        degree_high=8,
        heartbeat_interval=1,
        adaptive_gossip_enabled=False,
        eclipse_protection_enabled=False,  # it takes peers behind one address, or in one room, for one
        spam_protection_enabled=False,  # it counts per forwarder and drops in silence; see RateLimit
    )
    # as it is set up here it gives everybody the same score, and is asked for each message
    router.scorer = None
    pubsub = GuardedPubsub(host.libp2p, router, host.gate.loop_shares)
    async with open_nursery() as nursery:
        await nursery.start(_run, pubsub, router)
        gossip = Gossip(host, pubsub, identity, view)
        nursery.start_soon(gossip.repeat_unheard)
        yield gossip


async def _run(
    pubsub: GuardedPubsub,
    router: FloodingRouter,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    try:
        async with background_trio_service(pubsub) as manager, background_trio_service(router):
            # It would look through all tasks for the parent of each new one, and every message has a task.
            cast(Any, manager)._find_parent_task = lambda _: None
            await pubsub.wait_until_ready()
            task_status.started()
            await trio.sleep_forever()
    finally:
        pubsub.seen_messages.stop()  # a thread
