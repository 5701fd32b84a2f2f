"""Quarrels of neighbouring hops: one says that the other failed, and nobody else has seen it.

What is certain is that the edge between the two does not work. So the edge is made expensive for a while, and
routes keep the two apart where they can. Both are charged half a failed session, once for each pair in some
hours, however often it quarrels: a hop that always complains would else drag down whoever works beside it.
Who complains of one neighbour after the other is what those edges have in common, and is charged alone when
it does so again. So is who is complained of by one neighbour after the other; but keys are free, and of those
that complain only peers in good standing count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    def note(
        self, accuser: str, accused: str, now: float, in_standing: Callable[[str], bool]
    ) -> Mapping[str, float]:
        """Shares of a failed session that the two are to be charged, after `accuser` complained once more.

        Args:
            in_standing: Whether a peer has passed its audits as a newcomer.
        """
        self._heard_at[accuser, accused] = now
        lately = [pair for pair, at in self._charged_at.items() if at > now - CHARGED_S]
        if (accuser, accused) not in lately and (accused, accuser) not in lately:
            self._charged_at[accuser, accused] = now
            return {accuser: 0.5, accused: 0.5}
        if sum(by == accuser for by, _ in lately) > 1:
            return {accuser: 1.0}
        if sum(of == accused and in_standing(by) for by, of in lately) > 1:
            return {accused: 1.0}
        return {}

    def edges(self, now: float) -> dict[tuple[str, str], Edge]:
        """Edges that routes should not have, as a request has them."""
        lately = (pair for pair, at in self._heard_at.items() if at > now - EDGE_S)
        return dict.fromkeys(lately, Edge(AVOIDED_RTT_MS))
