"""Quarrels of neighbouring hops: one says that the other failed, and nobody else has seen it.

What is certain is that the edge between the two does not work. So the edge is made expensive for a while, and
routes keep the two apart where they can. Both are charged half a failed session, once for each pair in some
hours, however often it quarrels: a hop that always complains would else drag down whoever works beside it.
Who complains of one neighbour after the other is what those edges have in common, and is charged alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from p2pinfer.recent import Recent
from p2pinfer.routing.route import Edge

MAX_PAIRS: Final = 1024
EDGE_S: Final = 600.0  # how long the edge of a pair is avoided
CHARGED_S: Final = 6 * 3600.0  # how long a pair is not charged again
AVOIDED_RTT_MS: Final = 4000.0  # longer than any detour, and shorter than to be without a route


class Quarrels:
    """The pairs of peers of which one complained of the other, the latest first to be forgotten last."""

    def __init__(self) -> None:
        self._charged_at = Recent[tuple[str, str], float](MAX_PAIRS)  # (who complained, of whom)
        self._heard_at = Recent[tuple[str, str], float](MAX_PAIRS)

    def note(self, accuser: str, accused: str, now: float) -> Mapping[str, float]:
        """Shares of a failed session that both are to be charged, after `accuser` complained once more."""
        self._heard_at[accuser, accused] = now
        pairs = ((accuser, accused), (accused, accuser))
        if all(self._charged_at.get(pair, float("-inf")) <= now - CHARGED_S for pair in pairs):
            self._charged_at[accuser, accused] = now
            return {accuser: 0.5, accused: 0.5}
        accused_lately = {
            of for (by, of), at in self._charged_at.items() if by == accuser and at > now - CHARGED_S
        }
        return {accuser: 1.0} if len(accused_lately) > 1 else {}

    def edges(self, now: float) -> dict[tuple[str, str], Edge]:
        """Edges that routes should not have, as a request has them."""
        lately = (pair for pair, at in self._heard_at.items() if at > now - EDGE_S)
        return dict.fromkeys(lately, Edge(AVOIDED_RTT_MS))
