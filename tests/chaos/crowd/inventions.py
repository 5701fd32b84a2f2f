"""Peers that do not exist: signed announcements, which cost their inventor a key each."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.swarm.gossipsub import topic_of
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.routing.announcement import MAX_ADDRS, MAX_TTL_S, Announcement, encode_announcement


@dataclass(frozen=True)
class Invention:
    """One announcement: what a table keeps of it, and the message that brings it by gossip."""

    peer_id: str
    record: bytes
    message: Any


class Inventor:
    """Announces peers of a model, the fastest and longest-lived there are, at addresses of `victims`."""

    def __init__(self, revision: str, blocks: int, victims: tuple[str, ...], seed: int = 0) -> None:
        self._revision = revision
        self._blocks = blocks
        self._victims = victims or ("/ip4/127.0.0.1/tcp/9",)
        self._rng = random.Random(seed)

    def announce(self, identity: Identity) -> Invention:
        """What somebody with this key announces of itself."""
        half = self._blocks // 2
        span = self._rng.choice(((0, self._blocks), (0, half), (half, self._blocks)))
        announcement = Announcement(
            peer_id=identity.peer_id,
            model="tiny-stories",
            revision=self._revision,
            span=BlockSpan(*span),
            dtype="float32",
            tokens_per_s=1e6,
            free_cache_tokens=1 << 20,
            sequence=int(time.time() * 1000),
            reachability="public",
            nat="none",
            addrs=tuple(self._rng.sample(self._victims, min(MAX_ADDRS, len(self._victims)))),
            ttl_s=MAX_TTL_S,
        )
        record = seal(identity, encode_announcement(announcement))
        message = rpc_pb2.Message(
            data=record,
            topicIDs=[topic_of(self._revision)],
            from_id=ID.from_base58(identity.peer_id).to_bytes(),
            seqno=self._rng.randbytes(8),
        )
        signed = PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
        message.signature = identity.key_pair.private_key.sign(signed)
        message.key = identity.key_pair.public_key.serialize()
        return Invention(identity.peer_id, record, message)

    def invent(self) -> Invention:
        """Another peer that does not exist."""
        return self.announce(new_identity())
