"""Adapters that peers offer, found by id or name, and fetched from one of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from p2pinfer.errors import ConfigError, PeerError
from p2pinfer.models.learning.peft_lora import Lora
from p2pinfer.node.training.offered_adapters import fetch_adapter
from p2pinfer.routing.announcement import Announcement, OfferedAdapter
from p2pinfer.routing.route import Hop

if TYPE_CHECKING:
    from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
    from p2pinfer.node.swarm.membership import SwarmMember

logger = logging.getLogger(__name__)

WAIT_S: Final = 10.0  # for somebody to offer it, after a neighbour's table was taken in
MOST_ASKED: Final = 8  # peers that are asked for an adapter before it is given up
_ID: Final = re.compile(r"[0-9a-f]{8,64}")


def find_offer(asked: str, peers: Sequence[Announcement]) -> OfferedAdapter | None:
    """The adapter that is asked for by id, by the beginning of one, or by name; None if nobody offers it.

    Raises:
        ConfigError: Several adapters are called so.
    """
    offers = {each.digest: each for peer in peers for each in peer.adapters}
    is_id = _ID.fullmatch(asked) is not None
    found = [each for each in offers.values() if is_id and each.digest.hex().startswith(asked)]
    found = found or [each for each in offers.values() if each.name == asked]
    if len(found) > 1:
        ids = ", ".join(sorted(each.id for each in found)[:4])
        raise ConfigError(f"{len(found)} adapters are called {asked!r}; name one by its id: {ids}")
    return found[0] if found else None


async def fetch_offered(
    asked: str, member: SwarmMember, ends: EmbeddingAndHead
) -> tuple[OfferedAdapter, Lora]:
    """The adapter of this model that is asked for, from a peer that offers it.

    Raises:
        ConfigError: Nobody offers it, or several adapters are called so.
        PeerError: Nobody who offers it hands it out.
    """
    spec = ends.spec
    await member.wait_settled(WAIT_S)
    offer: OfferedAdapter | None = None
    with trio.move_on_after(WAIT_S):
        while (offer := find_offer(asked, member.announcements(spec.revision))) is None:
            await member.table_changed.wait()
    peers = member.announcements(spec.revision)
    if offer is None:
        names = sorted({f"{each.name} ({each.id})" for peer in peers for each in peer.adapters})
        offered = f"it has {', '.join(names[:4])}" if names else "it has none"
        raise ConfigError(
            f"there is no folder {asked!r}, and nobody in this swarm offers such an adapter of {spec.model}; "
            f"{offered}"
        )
    failure: PeerError | None = None
    offering = [peer for peer in peers if any(each.digest == offer.digest for each in peer.adapters)]
    for peer in offering[:MOST_ASKED]:
        fetch = partial(fetch_adapter, member.host, peer.peer_id, peer.addrs, offer.digest)
        try:
            return offer, await fetch(spec, ends.architecture)
        except PeerError as exc:
            logger.warning("no adapter %s from peer %s: %s", offer.id, peer.peer_id, exc)
            failure = exc
    assert failure is not None
    raise failure


def is_offered_by(hop: Hop, digest: bytes, peers: Sequence[Announcement]) -> bool:
    """True if a hop says that it offers an adapter, and serves just the blocks that it is asked for."""
    said = [peer for peer in peers if peer.peer_id == hop.peer_id and peer.span == hop.span]
    return any(each.digest == digest for peer in said for each in peer.adapters)
