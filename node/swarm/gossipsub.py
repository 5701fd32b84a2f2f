"""Subclasses of libp2p's GossipSub that correct lost messages, misplaced trust and wasted CPU time.

A message costs libp2p (0.8.1) several milliseconds at every node: each frame carries the sender's addresses,
signed, which are compared with the interfaces' for every frame sent and verified twice for every frame that
comes; and each message is followed by a frame to all the mesh that says it need not be sent again. Nobody
here reads those addresses, and an announcement is smaller than what such a frame saves.

What a neighbour says beside announcements is well-formed, cheap to send, and costs time here: thousands of
grafts, prunes and subscriptions fit one frame. So of each frame only what would be left of it is looked at:
the last word about a topic, and about topics of ours (`gossip_frames`). The time that it all takes is the
neighbour's (`loop_share`), and the reader gives way after every frame.

What a neighbour passes on beyond its limits is left out, and its frame costs a fraction of a millisecond even
so. So whoever brings hundreds of such messages is read from slowly: its window fills, and what it would send
waits on its own side.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any, Final, cast

import trio
from libp2p.io.exceptions import IOException, MessageTooLarge
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from libp2p.peer.id import ID
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.utils import safe_bytes_from_hex
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from p2pinfer.node.concurrency.loop_share import LoopShares, Meter, Overspent, clocked
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.host.gossip_frames import reduce_frame
from p2pinfer.recent import Recent

from .proof_gossip import is_notice
from .signed_records import MAX_RECORD_BYTES, peek_payload

logger = logging.getLogger(__name__)

MAX_SUBSCRIPTIONS: Final = 80  # of a neighbour that are remembered; an introducer has the most
MAX_RPC_BYTES: Final = 1 << 18  # of one pubsub frame; an announcement takes up to 8 KB
FORWARDS_PER_S: Final = 20.0  # messages a neighbour may forward; the whole swarm is meant to stay at 2
FORWARDS_AT_ONCE: Final = 200  # after a break, or when a swarm starts up together
NOTICES_PER_S: Final = 1 / 10  # of proofs that a neighbour may forward; tables bring what is left out
NOTICES_AT_ONCE: Final = 16
# Messages beyond these limits, until a neighbour is read from slowly. An honest one that is flooded passes on
# what its own limits let in: 0.1 notices a second for each neighbour that floods it, 16 at once.
LEFT_OUT_PER_S: Final = 2.0
LEFT_OUT_AT_ONCE: Final = 400
REPEATS_PER_S: Final = 16 << 10  # bytes of messages that a neighbour may ask for again, by their ids
REPEATS_AT_ONCE: Final = 512 << 10
MAX_BACK_OFFS: Final = 4096  # neighbours of a topic that are not grafted again yet
TOPIC: Final = re.compile(r"/p2pinfer/1/([0-9a-f]{32})/blocks")
MODELS_TOPIC: Final = "/p2pinfer/1/models"  # where everybody hears of a few peers of every model


def topic_of(revision: str) -> str:
    """The topic of a model revision."""
    return f"/p2pinfer/1/{revision}/blocks"


def is_topic(topic: str) -> bool:
    """True if a topic is one of p2pinfer's."""
    return topic == MODELS_TOPIC or TOPIC.fullmatch(topic) is not None


class _GossipHost:
    """The libp2p host as gossip sees it: with one signed record, made once, and no store of others' records.

    It plays the host's peer store and the record in it as well: libp2p asks the first for the second, and the
    second whether it still holds.
    """

    def __init__(self, host: Any) -> None:
        self._host = host
        self._record: bytes = env_to_send_in_RPC(host)[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def get_addrs(self) -> list[Any]:
        return []

    def get_peerstore(self) -> _GossipHost:
        return self

    def get_local_record(self) -> _GossipHost:
        return self

    def _env_addrs_set(self) -> set[Any]:
        return set()

    def marshal_envelope(self) -> bytes:
        return self._record

    def consume_peer_record(self, envelope: Any, ttl: int) -> bool:
        return True


class GuardedPubsub(Pubsub):
    """libp2p's Pubsub, which no message from a peer can end.

    It handles each in a task of a nursery that hangs below the caller's, and a malformed public key, for
    example, raises out of it.
    """

    def __init__(self, host: Any, router: FloodingRouter, shares: LoopShares) -> None:
        """`shares` count what each neighbour's frames take of the event loop."""
        self.gossipsub = router
        self._shares = shares
        self._meters = Recent[ID, Meter](MAX_BACK_OFFS)
        super().__init__(
            cast(Any, _GossipHost(host)),
            router,
            strict_signing=True,
            validation_cache_ttl=0,  # what was news is none the next time; the validator says so, a cache not
            max_subscriptions_per_peer=MAX_SUBSCRIPTIONS,
            max_inbound_rpc_size=MAX_RPC_BYTES,
        )
        self._forwards = RateLimit(FORWARDS_PER_S, FORWARDS_AT_ONCE)
        self._notices = RateLimit(NOTICES_PER_S, NOTICES_AT_ONCE)
        self._left_out = RateLimit(LEFT_OUT_PER_S, LEFT_OUT_AT_ONCE)
        self._told = RateLimit(1 / 60, 1)  # of what a neighbour should not have passed on

    async def continuously_read_stream(self, stream: Any) -> None:
        """Take in what a neighbour sends, frame by frame, until the stream ends.

        libp2p's own takes in whatever has come at once, however long that is, and schedules a task for every
        message and three for every subscription.
        """
        peer_id: ID = stream.muxed_conn.peer_id
        meter: Meter = stream.muxed_conn.meter
        self._meters[peer_id] = meter
        try:
            while self.manager.is_running:
                await clocked(self._take_frame(stream, peer_id), meter.spend)
                await trio.lowlevel.checkpoint()
                await meter.pause()
                await self._pause_flood(str(peer_id))
        except Overspent as exc:
            logger.debug("gossip.overspent peer=%s why=%s", peer_id, exc)
            await stream.muxed_conn.close()
        except MessageTooLarge as exc:
            logger.debug("gossip.too_large peer=%s why=%s", peer_id, exc)
            await stream.reset()
            self._handle_dead_peer(peer_id)
        except (StreamEOF, StreamError, IOException, RawConnError) as exc:
            logger.debug("gossip.ended peer=%s why=%r", peer_id, exc)

    async def _take_frame(self, stream: Any, peer_id: ID) -> None:
        rpc = rpc_pb2.RPC()
        rpc.ParseFromString(await read_varint_prefixed_bytes_limited(stream, self.max_inbound_rpc_size))
        reduce_frame(rpc, self.gossipsub.mesh.keys(), is_topic)
        for message in rpc.publish:
            # Before a signature is checked, and before there is a task: who floods costs a look at each.
            if (
                self.manager.is_running
                and self._is_subscribed_to_msg(message)
                and self._is_let_in(str(peer_id), message)
            ):
                self.manager.run_task(self.push_msg, peer_id, message)
        for subscription in rpc.subscriptions:
            self.handle_subscription(peer_id, subscription)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        if msg_forwarder == self.my_id:
            await super().push_msg(msg_forwarder, msg)
            return
        await clocked(self._push_theirs(msg_forwarder, msg), self._meter(msg_forwarder).spend)

    def _meter(self, peer_id: ID) -> Meter:
        return self._meters.get(peer_id) or self._shares.meter(str(peer_id), "")

    async def _replay_recent_messages(self, peer_id: ID, topic: str) -> None:
        await clocked(super()._replay_recent_messages(peer_id, topic), self._meter(peer_id).spend)

    def _is_let_in(self, forwarder: str, msg: rpc_pb2.Message) -> bool:
        """False for what a neighbour should not have passed on, and for more than it may."""
        now, why = trio.current_time(), ""
        if len(msg.data) > MAX_RECORD_BYTES or len(msg.topicIDs) != 1:
            why = "too_large"
            if self._told.take(forwarder, now):
                logger.info(
                    "%s passes on a record of %d bytes, %d are allowed; left out",
                    forwarder,
                    len(msg.data),
                    MAX_RECORD_BYTES,
                )
        elif not self._forwards.take(forwarder, now):
            why = "too_much"
        elif is_notice(peek_payload(msg.data)) and not self._notices.take(forwarder, now):
            why = "too_many_notices"  # whoever is there already may bring any number of them
        if why:
            self._left_out.spend(forwarder, now, 1)
            logger.debug("gossip.%s forwarder=%s", why, forwarder)
        return not why

    async def _pause_flood(self, forwarder: str) -> None:
        """Wait while a neighbour has brought far more than it may; without a checkpoint for all others."""
        while (wait_s := self._left_out.wait_s(forwarder, trio.current_time())) > 0:
            await trio.sleep(wait_s)

    async def _push_theirs(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as exc:
            logger.debug("gossip.failed forwarder=%s why=%r", msg_forwarder, exc)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        """Open our stream to a neighbour, and tell it what we entered while its greeting was under way.

        libp2p writes the greeting, with the topics of that moment, and counts the neighbour among those who
        hear of others only once it has been sent.
        """
        if peer_id in self.peers:
            return
        before = set(self.topic_ids)
        await super()._handle_new_peer(peer_id)
        queue = self.peer_queues.get(peer_id)
        if queue is not None:
            for topic in before.symmetric_difference(self.topic_ids):
                rpc, change = self._build_announce_rpc(topic, subscribe=topic in self.topic_ids)
                self._enqueue_or_retry_announce(peer_id, queue, rpc, change)

    async def subscribe(self, topic_id: str) -> Any:
        """Enter the topic's mesh, and only then say that we are there.

        libp2p does it the other way round: what a neighbour publishes as soon as it knows of us arrives
        before there is a mesh, and goes no further.
        """
        await self.gossipsub.join(topic_id)
        return await super().subscribe(topic_id)

    def handle_subscription(self, origin_id: ID, sub_message: rpc_pb2.RPC.SubOpts) -> None:
        """Remember topics of ours only: another may be as long as a frame."""
        if is_topic(sub_message.topicid):
            super().handle_subscription(origin_id, sub_message)

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        """The validator has taken the record in; there is no queue to be read."""


class FloodingRouter(GossipSub):
    """libp2p's GossipSub, which tells when somebody new listens.

    An exception in one of its background tasks ends nothing but that task's turn.
    """

    on_change: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._repeats = RateLimit(REPEATS_PER_S, REPEATS_AT_ONCE)

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        rpc.ClearField("senderRecord")  # Pubsub has verified it
        await super().handle_rpc(rpc, sender_peer_id)

    def send_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC, priority: bool = False) -> None:
        rpc.ClearField("senderRecord")  # nobody reads it, and to verify it takes longer than all the rest
        super().send_rpc(peer_id, rpc, priority)

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Any) -> None:
        """Save neighbours what is large: no message of ours is."""

    def _get_peers_to_send(self, topic_ids: Any, msg_forwarder: ID, origin: ID, msg_id: Any = None) -> Any:
        """Receivers of a message: our own news goes to every neighbour in the topic, others' to the mesh.

        "In flood publishing, ... the router publishes the message to all peers with a score greater than
        publishThreshold" -- gossipsub v1.1. Who comes back within a minute, or finds a neighbour's mesh full,
        is kept out of that mesh for a minute, and would not be heard all that time.
        """
        pubsub: Any = self.pubsub
        if origin != pubsub.my_id:
            return super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id)
        return {
            peer for topic in topic_ids for peer in pubsub.peer_topics.get(topic, ()) if peer in pubsub.peers
        }

    async def on_peer_subscribed(self, peer_id: ID, topic: str) -> None:
        try:
            await super().on_peer_subscribed(peer_id, topic)
        except Exception as exc:
            logger.debug("gossip.failed peer=%s why=%r", peer_id, exc)
        self.on_change()

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        """Hand out messages that a neighbour lacks: an id is 80 bytes long, and its message up to 16 KB."""
        now, peer = trio.current_time(), str(sender_peer_id)
        kept: list[Any] = []
        for message_id in iwant_msg.messageIDs:
            message = self.mcache.get(safe_bytes_from_hex(cast(Any, message_id)) or b"")
            if message is not None and self._repeats.take(peer, now, message.ByteSize()):
                kept.append(message_id)
        if kept:
            await super().handle_iwant(rpc_pb2.ControlIWant(messageIDs=kept), sender_peer_id)

    async def handle_graft(self, graft_msg: rpc_pb2.ControlGraft, sender_peer_id: ID) -> None:
        await super().handle_graft(graft_msg, sender_peer_id)
        self.on_change()

    def mesh_heartbeat(self) -> Any:
        grafts, prunes = super().mesh_heartbeat()
        # "A peer should not graft a peer it has pruned before the backoff has elapsed." -- gossipsub v1.1
        # libp2p notes it only where it was pruned. Who grafts again is taken for a flood there.
        for peer_id, topics in prunes.items():
            for topic in topics:
                self._add_back_off(peer_id, topic, False)
        self._forget_back_offs()
        self.on_change()
        return grafts, prunes

    def _forget_back_offs(self) -> None:
        """libp2p forgets a back-off only when the same neighbour comes again."""
        now = int(time.time())
        for back_offs in self.back_off.values():
            for peer_id in [peer_id for peer_id, until in back_offs.items() if until <= now]:
                del back_offs[peer_id]
            for peer_id in list(back_offs)[: max(0, len(back_offs) - MAX_BACK_OFFS)]:
                del back_offs[peer_id]

    async def flush_pending_messages(self, peer_id: ID) -> None:
        try:
            await super().flush_pending_messages(peer_id)
        except Exception as exc:
            logger.debug("gossip.failed peer=%s why=%r", peer_id, exc)

    async def heartbeat(self) -> None:
        while True:
            try:
                await super().heartbeat()
            except Exception:
                logger.exception("a heartbeat of gossip failed; going on")
                await trio.sleep(self.heartbeat_interval)
