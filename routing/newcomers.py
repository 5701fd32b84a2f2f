"""Trial of untested peers, without an advantage for anyone who uses many identities.

A newcomer's scores are low because nobody looked yet, so a planner that prices them in never finds out. The
default policy therefore plans a share of its sessions by what each peer's scores may be at best, the other
end of the same interval: optimism in the face of uncertainty, as in bandit algorithms (Auer, Cesa-Bianchi and
Fischer, "Finite-time Analysis of the Multiarmed Bandit Problem", 2002). Such a session goes to peers that
would be used if they were trusted, and is audited more, because audits follow doubt.

There are two such shares. In the smaller one everybody is at best, so all strangers together get no more than
that, however many there are. In the larger one those are who have passed an audit and failed none. They are
audited in every session until they are no newcomers, so whoever lies then is found out by its first lie or
its second; and without it, the audits that make a peer known took a hundred sessions and more.

An identity is a key pair and costs nothing. What costs something is an address: in each such session only one
newcomer of an address range is considered (address_ranges.py), so a thousand keys on one line have one line's
chances. Anybody can announce any address. So a range counts where the peer was found, by dialling it or by a
connection that came from it; what it announces counts against it alone. Until a peer was found, the most
crowded of the ranges that it announces is its own: an invented address beside the true one, by which it must
be reached, gains nothing. Peers behind a relay share its range, those without any address one range together,
and who announces nothing but names waits until they are resolved. Peers that were found in a range and those
that only announce it take turns among themselves, not with each other. A range in which a banned peer was
found waits, and goes on waiting for a week when that peer is gone. Proof of work was considered: it taxes a
phone much and a data centre little. A payment or a chain of vouchers would need somebody whom all trust. So
standing is paid for in audited work, which a new key has to do over again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from p2pinfer.reputation.score import Score
from p2pinfer.reputation.view import ReputationView

from .address_ranges import (
    NO_RANGE,
    address_range,
    allocation_of,
    is_allocation,
    is_everywhere,
    name_in,
    ranges_of,
)
from .config import RoutingConfig
from .eligibility import eligible
from .planner import cheapest_routes
from .route import Candidate, Route, RouteRequest

__all__ = ["NO_RANGE", "address_range", "grouped_by_range", "plan_optimistically", "ranges_of"]


def grouped_by_range(newcomers: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Newcomers by address range, each once: in the most crowded of those it may be in."""
    ranges = {peer.peer_id: {allocation_of(each) for each in _ranges(peer)} for peer in newcomers}
    crowd = Counter(each for announced in ranges.values() for each in announced)
    groups: dict[str, list[Candidate]] = {}
    for peer in newcomers:
        most = max(ranges[peer.peer_id], key=lambda each: (crowd[each], each))
        groups.setdefault(most, []).append(peer)
    return groups


def plan_optimistically(
    candidates: Sequence[Candidate],
    request: RouteRequest,
    view: ReputationView,
    config: RoutingConfig,
    rng: random.Random,
    *,
    strangers: bool = True,
) -> Route:
    """The cheapest route if every peer is what it may be at best; of each range one newcomer is considered.

    Args:
        strangers: Whether that goes for who has passed no audit yet, and for who has failed one.

    Raises:
        NoRoute: As `cheapest_routes`; some of the newcomers may have been needed.
    """
    usable = eligible(candidates, request, view)  # by what is known: a floor on integrity means just that
    newcomers = [peer for peer in usable if _is_tried(view.score(peer.peer_id), strangers)]
    spoilt = request.spoilt_ranges | {
        each
        for peer in candidates
        if view.is_banned(peer.peer_id)
        for each in peer.found_in or ()
        if not is_allocation(each)
    }
    waiting = {peer.peer_id for peer in newcomers}
    clean = [peer for peer in newcomers if not _may_be_in(spoilt, peer) and not _is_only_named(peer)]
    # Who was found in a range does not have to share its chances with those that only say they are there.
    for found in (True, False):
        of_kind = [peer for peer in clean if bool(peer.found_in) == found]
        for group in grouped_by_range(of_kind).values():
            waiting.discard(rng.choice(group).peer_id)
    considered = [peer for peer in usable if peer.peer_id not in waiting]
    return cheapest_routes(considered, request, _OptimisticView(view, strangers), config)[0]


def _is_tried(score: Score, strangers: bool) -> bool:
    return score.is_newcomer and (strangers or not score.is_stranger)


class _OptimisticView:
    """A view in which every doubt goes in the peer's favour; not in a stranger's unless that is wanted."""

    def __init__(self, view: ReputationView, strangers: bool) -> None:
        self._view = view
        self._strangers = strangers

    def score(self, peer_id: str) -> Score:
        score = self._view.score(peer_id)
        if score.at_best is None:
            return score
        doubtful = score.is_stranger or score.at_best.integrity < 1
        return score if doubtful and not self._strangers else score.at_best

    def is_banned(self, peer_id: str) -> bool:
        return self._view.is_banned(peer_id)


def _ranges(peer: Candidate) -> frozenset[str]:
    """Ranges that a peer was found in; else those that it says, local ones only if it has no others."""
    if peer.found_in:
        return peer.found_in
    ranges = frozenset(map(address_range, peer.announcement.addrs)) | peer.named_in or {NO_RANGE}
    return frozenset(each for each in ranges if not is_everywhere(each)) or frozenset(ranges)


def _may_be_in(spoilt: frozenset[str], peer: Candidate) -> bool:
    """True if the peer is in one of the ranges, or as long as it was not found says so."""
    return any(each in spoilt or allocation_of(each) in spoilt for each in _ranges(peer))


def _is_only_named(peer: Candidate) -> bool:
    """True if all that is known of where the peer is are names."""
    addrs = peer.announcement.addrs
    return peer.found_in is None and not peer.named_in and bool(addrs) and all(map(name_in, addrs))
