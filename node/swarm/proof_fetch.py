"""Fetch of a proof's parts from whoever may hold them, within bounds of bytes."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import PeerError
from p2pinfer.node.evidence.store import MAX_DIGESTS, EvidenceStore, fetch_evidence
from p2pinfer.node.host.network import Network

logger = logging.getLogger(__name__)

NEIGHBOURS_ASKED: Final = 8


@dataclass(frozen=True, slots=True)
class Holders:
    """Peers that may hold a proof.

    Attributes:
        told_by: Who passed its notice on; empty if that is not known.
        author: Who published it, at `addrs`.
        accused: Who is not asked.
    """

    told_by: str
    author: str
    accused: str
    addrs: tuple[str, ...] = ()

    def in_order(self, host: Network) -> list[str]:
        """Peers to ask: first tellers first, then some neighbours; never the accused."""
        first = dict.fromkeys(filter(None, [self.told_by, self.author]))
        others = [peer_id for peer_id in host.connected_peers() if peer_id not in first]
        random.shuffle(others)
        return [each for each in (*first, *others[:NEIGHBOURS_ASKED]) if each != self.accused]


async def fetch_parts(
    host: Network,
    stores: Sequence[EvidenceStore],
    holders: Holders,
    digests: Sequence[bytes],
    max_bytes: int,
    on_bytes: Callable[[int], None],
) -> dict[bytes, bytes]:
    """All of `digests`, of which `stores` may hold some; `on_bytes` is told of every piece that arrives.

    Each holder is asked again for what one answer had no room for, and not again if it has no more.

    Raises:
        PeerError: Nobody has all of them, or they are more than `max_bytes`.
    """
    now = trio.current_time()
    found: dict[bytes, bytes] = {}
    for digest in digests:
        here = next((held for each in stores if (held := each.get(digest, now)) is not None), None)
        if here is not None:
            found[digest] = bytes(here)
    for peer_id in holders.in_order(host):
        more = True
        while more and (missing := [digest for digest in digests if digest not in found]):
            left = max_bytes - sum(map(len, found.values()))
            addrs = holders.addrs if peer_id == holders.author else ()
            try:
                got = await fetch_evidence(
                    host, peer_id, missing[:MAX_DIGESTS], addrs, max_bytes=left, on_bytes=on_bytes
                )
                more = bool(got)
            except PeerError as exc:
                logger.debug("proof.not_there peer=%s why=%s", peer_id, exc)
                break
            found |= got
    if any(digest not in found for digest in digests):
        raise PeerError(f"nobody has all of the proof against {holders.accused}", holders.author)
    return found
