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
newcomer of an address range (/24 of IPv4, /48 of IPv6, a DNS name as it is) is considered, so a thousand keys
on one line have one line's chances. A peer that announces several ranges counts in the most crowded of them:
an invented address beside the true one, by which it must be reached, gains nothing. Peers behind a relay
share its range, and those without any address one range together. A range with a banned peer in it waits, and
goes on waiting for a week when that peer is gone, unless it was a relay's. Proof of work was considered: it
taxes a phone much and a data centre little. A payment or a chain of vouchers would need somebody whom all
trust. So standing is paid for in audited work, which a new key has to do over again.
"""

from __future__ import annotations

import ipaddress
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from p2pinfer.reputation.score import Score
from p2pinfer.reputation.view import ReputationView

from .config import RoutingConfig
from .eligibility import eligible
from .planner import cheapest_routes
from .route import Candidate, Route, RouteRequest

NO_RANGE = "none"
_LOCAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
            *("127.0.0.0/8", "169.254.0.0/16", "fc00::/7", "fe80::/10", "::/48"),
        ),
    )
)
_FIRST_PARTS = re.compile(r"\A/(ip4|ip6|dns|dns4|dns6|dnsaddr)/([^/]+)")


def ranges_of(addresses: Iterable[str]) -> frozenset[str]:
    """The ranges by which a peer can be told again: of addresses that are its own, and mean it everywhere."""
    own = (address for address in addresses if "/p2p-circuit" not in address)
    return frozenset(each for each in map(address_range, own) if not _is_everywhere(each))


def address_range(address: str) -> str:
    """Range that a multiaddr belongs to: `/ip4/192.0.2.77/tcp/4001` is one of 192.0.2.0/24.

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
        each for peer in candidates if view.is_banned(peer.peer_id) for each in _ranges(peer) - {NO_RANGE}
    }
    waiting = {peer.peer_id for peer in newcomers}
    for name, group in grouped_by_range(newcomers).items():
        if name not in spoilt:
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


def _ranges(peer: Candidate) -> set[str]:
    ranges = {address_range(address) for address in peer.announcement.addrs} or {NO_RANGE}
    return {each for each in ranges if not _is_everywhere(each)} or ranges


def _is_everywhere(name: str) -> bool:
    """True if the range is in many networks: every second home is 192.168.1.0/24."""
    if name == NO_RANGE:
        return True
    try:
        network = ipaddress.ip_network(name)
    except ValueError:
        return False
    return any(network.version == local.version and network.overlaps(local) for local in _LOCAL)
