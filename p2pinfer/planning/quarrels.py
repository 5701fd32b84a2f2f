"""Quarrels of neighbouring hops: one says that the other failed, and nobody else has seen it.

What is certain is that the edge between the two does not work. So the edge is made expensive for a while, and
routes keep the two apart where they can. Both are charged half a failed session, once for each pair in some
hours, however often it quarrels: a hop that always complains would else drag down whoever works beside it.

Who complains of one neighbour after the other is what those edges have in common, and is charged alone when
it does so again. But neighbours can give a hop good reason to complain, and keys are free. So of those that a
peer in good standing complains of, only such peers count. The other way round it is the same: who is
complained of by one neighbour after the other is charged alone, and of those that complain only peers in good
standing count. That comes once for each pair, since two peers may have earned their standing for it.
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
        self._repeated_at = Recent[tuple[str, str], float](MAX_PAIRS)  # when the accused was charged alone
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
        counts_all = not in_standing(accuser)
        if sum(by == accuser and (counts_all or in_standing(of)) for by, of in lately) > 1:
            return {accuser: 1.0}
        is_new = self._repeated_at.get((accuser, accused), -CHARGED_S) <= now - CHARGED_S
        if is_new and sum(of == accused and in_standing(by) for by, of in lately) > 1:
            self._repeated_at[accuser, accused] = now
            return {accused: 1.0}
        return {}

    def edges(self, now: float) -> dict[tuple[str, str], Edge]:
        """Edges that routes should not have, as a request has them."""
        lately = (pair for pair, at in self._heard_at.items() if at > now - EDGE_S)
        return dict.fromkeys(lately, Edge(AVOIDED_RTT_MS))
