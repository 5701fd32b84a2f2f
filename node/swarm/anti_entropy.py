"""Anti-entropy: asks a neighbour from time to time for records that gossip did not bring.

Gossip is quick and promises nothing: what is published while a mesh forms, or while it is pruned, reaches
only some, and the others would have to wait until its author repeats it. So every table is compared with one
neighbour's, often at first and once a minute in the long run: between two that agree that is some kilobytes
and a round trip. What only a few know spreads in a number of turns that grows with the swarm's logarithm.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection
from typing import Final

import trio

from p2pinfer.errors import PeerError
from p2pinfer.node.host.host import Host

from .live_table import LiveTable
from .proof_gossip import ProofCarrier
from .snapshot import fetch_snapshot

logger = logging.getLogger(__name__)

FIRST_S: Final = 1.0  # after joining
LAST_S: Final = 60.0
URGENT_S: Final = 8.0
MUCH: Final = 0.02  # of a table: with as much news as that the next turn comes sooner


class AntiEntropy:
    """Compares this process's table with its neighbours'."""

    def __init__(
        self,
        host: Host,
        view: LiveTable,
        revisions: Callable[[], Collection[str]],
        proofs: ProofCarrier | None = None,
        rng: random.Random | None = None,
        is_urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        """Set up; nobody is asked before `serve` runs.

        Args:
            revisions: Gives the models whose announcements matter here; none means all.
            is_urgent: Whether a turn should come within `URGENT_S`, however well the tables agree.
        """
        self._host = host
        self._view = view
        self._revisions = revisions
        self._proofs = proofs
        self._rng = rng or random.Random()
        self._is_urgent = is_urgent

    async def serve(self) -> None:
        """Go on until cancelled."""
        pause_s = FIRST_S
        while True:
            await trio.sleep(pause_s * self._rng.uniform(0.75, 1.25))
            news = await self.compare()
            pause_s = next_pause_s(pause_s, news)
            if self._is_urgent():
                pause_s = min(pause_s, URGENT_S)

    async def compare(self) -> float:
        """Ask a neighbour what we lack; the share of our table that was news."""
        neighbours = self._host.connected_peers()
        if not neighbours:
            return 1.0  # as good as having joined just now
        peer_id = self._rng.choice(neighbours)
        revision = self._rng.choice([*sorted(self._revisions())] or [None])
        try:
            news = await fetch_snapshot(self._host, self._view, peer_id, revision, self._proofs)
        except PeerError as exc:
            logger.debug("anti_entropy.failed peer=%s why=%s", peer_id, exc)
            return 0.0
        if news:
            logger.debug("anti_entropy.news peer=%s records=%d", peer_id, news)
        return news / max(1, len(self._view.records(revision)))


def next_pause_s(pause_s: float, news: float) -> float:
    """Half as long after much news, else twice as long."""
    return max(FIRST_S, pause_s / 2) if news > MUCH else min(LAST_S, pause_s * 2)
