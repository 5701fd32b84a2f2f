"""Announcements over GossipSub: one topic per model revision, and nothing forged is passed on.

Every record is opened in the topic's validator, so a bad one is neither taken in nor forwarded. An
introducer, which holds no model, follows the topics its neighbours are in, up to `MAX_FOLLOWED`: a mesh
forwards only what its members subscribe to, and newcomers know nobody but the introducer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from p2pinfer.errors import ProtocolViolation
from p2pinfer.routing.announcement import Announcement

from .host import Host
from .identity import Identity
from .tasks import open_nursery
from .view import SwarmView

logger = logging.getLogger(__name__)

MAX_FOLLOWED: Final = 64
FOLLOW_INTERVAL_S: Final = 0.5
_TOPIC: Final = re.compile(r"/p2pinfer/1/([0-9a-f]{32})/blocks")


def topic_of(revision: str) -> str:
    """The topic of a model revision."""
    return f"/p2pinfer/1/{revision}/blocks"


class Gossip:
    """Hears and tells who serves what. Made by `open_gossip`."""

    def __init__(self, pubsub: Pubsub, identity: Identity, view: SwarmView, nursery: trio.Nursery) -> None:
        self._pubsub: Any = pubsub
        self._identity = identity
        self._view = view
        self._nursery = nursery
        self._joined: set[str] = set()

    async def join(self, revision: str) -> None:
        """Hear of everybody who serves `revision`; harmless twice."""
        if revision in self._joined:
            return
        self._joined.add(revision)
        topic = topic_of(revision)

        def is_valid(forwarder: ID, message: Any) -> bool:
            if forwarder == self._pubsub.my_id:
                return True
            try:
                self._view.take(bytes(message.data), revision=revision)
            except ProtocolViolation as exc:
                logger.debug("gossip.rejected forwarder=%s why=%s", forwarder, exc)
                return False
            return True

        self._pubsub.set_topic_validator(topic, is_valid, False)
        subscription = await self._pubsub.subscribe(topic)
        self._nursery.start_soon(_drain, subscription)

    async def announce(self, announcement: Announcement) -> None:
        """Tell everybody in the topic."""
        record = self._view.publish(self._identity, announcement)
        await self._pubsub.publish(topic_of(announcement.revision), record)

    async def follow_neighbours(self) -> None:
        """Join whatever topics of ours the neighbours are in, until cancelled."""
        while True:
            for topic in list(self._pubsub.peer_topics):
                match = _TOPIC.fullmatch(topic)
                if match and len(self._joined) < MAX_FOLLOWED:
                    await self.join(match[1])
            await trio.sleep(FOLLOW_INTERVAL_S)


async def _drain(subscription: Any) -> None:
    """The validator has read the messages; the queue must not fill up."""
    while True:
        await subscription.get()


@asynccontextmanager
async def open_gossip(host: Host, identity: Identity, view: SwarmView) -> AsyncGenerator[Gossip]:
    """Gossip over `host` until the block ends."""
    router = GossipSub(
        protocols=[PROTOCOL_ID_V12, PROTOCOL_ID_V11],
        degree=6,
        degree_low=4,
        degree_high=12,
        heartbeat_interval=1,
    )
    pubsub = Pubsub(host.libp2p, router, strict_signing=True)
    async with (
        background_trio_service(pubsub),
        background_trio_service(router),
        open_nursery() as nursery,
    ):
        await pubsub.wait_until_ready()
        yield Gossip(pubsub, identity, view, nursery)
