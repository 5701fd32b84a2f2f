"""Giving newcomers a try, and not more to who comes under many names.

A newcomer's integrity is low because nobody looked yet, so a planner that prices it in never finds out. The
default policy therefore reserves a share of the sessions: in those, one newcomer takes its whole span, and
the cheapest peers the rest. That share is all that newcomers get together, however many there are.

An identity is a key pair and costs nothing. What costs something is an address: newcomers are drawn by
address range first (/24 of IPv4, /48 of IPv6, a DNS name as it is) and within it second, so a thousand keys
on one line get one line's share. A peer that announces several ranges counts in the most crowded of them:
an invented address beside the true one, by which it must be reached, gains nothing. Peers behind a relay
share its range, and those without any address one range together. Proof of work was considered: it taxes a
phone much and a data centre little. A payment or a vouching chain would need somebody whom
all trust. So standing is paid for in audited work, which a new key has to do over again.
"""

from __future__ import annotations

import ipaddress
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from p2pinfer.errors import NoRoute
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.view import ReputationView

from .config import RoutingConfig
from .cost import route_cost
from .eligibility import eligible
from .planner import cheapest_routes
from .route import Candidate, Hop, Route, RouteRequest

NO_RANGE = "none"
_MIN_RELIABILITY = 0.5  # a newcomer that fails every other session had its tries
_TRIES = 3  # newcomers looked at before the reserved session goes to the best route after all
_FIRST_PARTS = re.compile(r"\A/(ip4|ip6|dns|dns4|dns6|dnsaddr)/([^/]+)")


def address_range(address: str) -> str:
    """What a multiaddr counts as: `/ip4/192.0.2.77/tcp/4001` is one of 192.0.2.0/24.

    It is the first address in it that counts, which of a relayed one is the relay's.
    """
    parts = _FIRST_PARTS.match(address)
    if parts is None:
        return NO_RANGE
    if parts[1].startswith("dns"):
        return parts[2].lower()
    try:
        prefix = 24 if parts[1] == "ip4" else 48
        return str(ipaddress.ip_network(f"{parts[2]}/{prefix}", strict=False))
    except ValueError:
        return NO_RANGE


def grouped_by_range(newcomers: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Newcomers by address range, each once: in the most crowded of the ranges it announces."""
    ranges = {peer.peer_id: _ranges(peer) for peer in newcomers}
    crowd = Counter(each for announced in ranges.values() for each in announced)
    groups: dict[str, list[Candidate]] = {}
    for peer in newcomers:
        most = max(ranges[peer.peer_id], key=lambda each: (crowd[each], each))
        groups.setdefault(most, []).append(peer)
    return groups


def route_with_newcomer(
    best: Route,
    candidates: Sequence[Candidate],
    request: RouteRequest,
    view: ReputationView,
    config: RoutingConfig,
    rng: random.Random,
) -> Route | None:
    """A route that gives some newcomer a try; None if nobody is to be tried.

    Args:
        best: What would be walked otherwise. If it has a newcomer already, nobody else is tried.
    """
    if any(view.score(peer_id).is_newcomer for peer_id in best.peer_ids):
        return None
    allowed_s = config.explore_slack * route_cost(best, candidates, request, config=config)
    for newcomer in _drawn(eligible(candidates, request, view), view, rng):
        route = route_through(newcomer, candidates, request, view, config)
        # Without the price of risk, which is what the try is to find out about.
        if route is not None and route_cost(route, candidates, request, config=config) <= allowed_s:
            return route
    return None


def route_through(
    peer: Candidate,
    candidates: Sequence[Candidate],
    request: RouteRequest,
    view: ReputationView,
    config: RoutingConfig,
) -> Route | None:
    """The cheapest way to `peer`, all that it serves of the blocks wanted, and the cheapest way on."""
    wanted = request.wanted
    start, stop = max(peer.span.start, wanted.start), min(peer.span.stop, wanted.stop)
    if start >= stop:
        return None
    hops: tuple[Hop, ...] = ()
    excluded = request.excluded | {peer.peer_id}
    try:
        if wanted.start < start:
            before = replace(request, span=BlockSpan(wanted.start, start), sink=peer, excluded=excluded)
            hops = cheapest_routes(candidates, before, view, config)[0].hops
            excluded = excluded | {hop.peer_id for hop in hops}
        hops = (*hops, peer.hop(BlockSpan(start, stop)))
        if stop < wanted.stop:
            after = replace(request, span=BlockSpan(stop, wanted.stop), source=peer, excluded=excluded)
            hops = (*hops, *cheapest_routes(candidates, after, view, config)[0].hops)
    except NoRoute:
        return None
    return Route(hops)


def _drawn(usable: Sequence[Candidate], view: ReputationView, rng: random.Random) -> Iterator[Candidate]:
    """A few newcomers, each from another range, every range as likely as another."""
    newcomers = [peer for peer in usable if _is_worth_a_try(peer, view)]
    groups = grouped_by_range(newcomers)
    for name in rng.sample(sorted(groups), min(_TRIES, len(groups))):
        yield rng.choice(groups[name])


def _is_worth_a_try(peer: Candidate, view: ReputationView) -> bool:
    score = view.score(peer.peer_id)
    return score.is_newcomer and score.reliability >= _MIN_RELIABILITY


def _ranges(peer: Candidate) -> set[str]:
    return {address_range(address) for address in peer.announcement.addrs} or {NO_RANGE}
