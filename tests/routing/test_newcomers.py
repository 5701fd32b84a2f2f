"""Newcomers are given a try, each address range as often as another, and no more than their share."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given

from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.score import Score
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.cost import route_cost
from p2pinfer.routing.eligibility import eligible
from p2pinfer.routing.newcomers import NO_RANGE, address_range, grouped_by_range, route_through
from p2pinfer.routing.policy import RiskAdjusted, ask_policy
from p2pinfer.routing.route import Candidate, Hop, Route, RouteRequest

from .test_planner import Swarm, every_route, swarms

REVISION = "a" * 32
REQUEST = RouteRequest(REVISION, num_blocks=8, hidden_bytes_per_token=64, tokens=100)


def candidate(
    peer_id: str, start: int = 0, stop: int = 8, tokens_per_s: float = 10.0, addrs: tuple[str, ...] = ()
) -> Candidate:
    said = Announcement(
        peer_id, "m", REVISION, BlockSpan(start, stop), "float32", tokens_per_s, 100, 1, addrs=addrs
    )
    return Candidate(said)


class View:
    """Everybody is proven but the newcomers."""

    def __init__(self, *newcomers: str, reliability: float = 0.8) -> None:
        self._newcomers = newcomers
        self._reliability = reliability

    def score(self, peer_id: str) -> Score:
        return Score(0.05, self._reliability, True) if peer_id in self._newcomers else Score(0.99, 0.99)

    def is_banned(self, peer_id: str) -> bool:
        return peer_id == "banned"


def chosen(
    peers: list[Candidate],
    view: View,
    *,
    request: RouteRequest = REQUEST,
    times: int = 4000,
    config: RoutingConfig | None = None,
) -> Counter[str]:
    """How often each peer is in the first route."""
    policy = RiskAdjusted(config, rng=random.Random(1), alternatives=1)
    counts: Counter[str] = Counter()
    for _ in range(times):
        counts.update(ask_policy(policy, peers, request, view)[0].peer_ids)
    return counts


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/192.0.2.77/tcp/4001", "192.0.2.0/24"),
        ("/ip4/192.0.2.9/tcp/1/p2p/Qm/p2p-circuit/p2p/12D3", "192.0.2.0/24"),
        ("/ip6/2001:db8:1:2::3/tcp/1", "2001:db8:1::/48"),
        ("/dns4/Node.Example/tcp/1", "node.example"),
        ("/ip4/999.0.0.1/tcp/1", NO_RANGE),
        ("/onion3/abc:1", NO_RANGE),
    ],
)
def test_an_address_counts_as_its_range(address: str, expected: str) -> None:
    assert address_range(address) == expected


def test_an_invented_address_beside_the_true_one_gains_nothing() -> None:
    true = "/ip4/198.51.100.1/tcp/1"
    crowd = [candidate(f"s{n}", addrs=(f"/ip4/203.0.{n}.1/tcp/1", true)) for n in range(9)]
    alone = candidate("alone", addrs=("/ip4/192.0.2.1/tcp/1",))
    groups = grouped_by_range([*crowd, alone, candidate("nowhere")])
    assert {name: len(peers) for name, peers in groups.items()} == {
        "198.51.100.0/24": 9,
        "192.0.2.0/24": 1,
        NO_RANGE: 1,
    }


def test_newcomers_together_get_their_share_and_no_more() -> None:
    config = RoutingConfig()
    peers = [candidate("proven", tokens_per_s=11.0)] + [
        candidate(f"new{n}", addrs=(f"/ip4/192.0.{n}.1/tcp/1",)) for n in range(5)
    ]
    counts = chosen(peers, View(*(f"new{n}" for n in range(5))))
    share = 1 - counts["proven"] / 4000
    assert share == pytest.approx(config.explore_share, abs=0.012)
    assert all(counts[f"new{n}"] == pytest.approx(4000 * config.explore_share / 5, rel=0.4) for n in range(5))


def test_a_thousand_keys_on_one_line_get_one_lines_share() -> None:
    sybils = [candidate(f"s{n}", addrs=(f"/ip4/203.0.113.{n}/tcp/1",)) for n in range(30)]
    honest = candidate("honest", addrs=("/ip4/192.0.2.1/tcp/1",))
    names = [peer.peer_id for peer in (*sybils, honest)]
    counts = chosen([candidate("proven", tokens_per_s=11.0), honest, *sybils], View(*names))
    assert counts["honest"] == pytest.approx((4000 - counts["proven"]) / 2, rel=0.2)


@pytest.mark.parametrize(
    ("newcomer", "view", "request_"),
    [
        (candidate("new", tokens_per_s=3.0), View("new"), REQUEST),
        (candidate("new"), View("new", reliability=0.4), REQUEST),
        (candidate("new", 0, 4), View("new"), REQUEST),
        (candidate("new"), View("new"), replace(REQUEST, span=BlockSpan(0, 8))),
        (candidate("new"), View("new"), replace(REQUEST, min_integrity=0.5)),
        (candidate("new"), View("new"), replace(REQUEST, excluded=frozenset({"new"}))),
        (candidate("new", 8, 9), View("new"), REQUEST),
        (candidate("banned"), View("banned"), REQUEST),
    ],
)
def test_nobody_is_tried_who_is_too_slow_unreliable_of_no_use_or_not_wanted(
    newcomer: Candidate, view: View, request_: RouteRequest
) -> None:
    counts = chosen([candidate("proven"), newcomer], view, request=request_, times=300)
    assert counts == {"proven": 300}


def test_who_is_a_newcomer_among_newcomers_waits_for_its_turn() -> None:
    """Where the best route has a newcomer anyway, there is nothing to reserve."""
    counts = chosen([candidate("a", tokens_per_s=12.0), candidate("b")], View("a", "b"), times=300)
    assert counts == {"a": 300}


def test_a_try_covers_the_blocks_around_the_newcomer() -> None:
    peers = [candidate("left", 0, 5), candidate("right", 3, 8)]
    new = candidate("new", 3, 5)
    route = route_through(new, [*peers, new], REQUEST, View("new"), RoutingConfig())
    assert route is not None
    assert [(hop.peer_id, str(hop.span)) for hop in route.hops] == [
        ("left", "0:3"),
        ("new", "3:5"),
        ("right", "5:8"),
    ]


@given(swarms(max_peers=4, max_blocks=4))
def test_a_try_is_as_cheap_as_any_route_that_gives_the_newcomer_all_it_serves_or_nearly(swarm: Swarm) -> None:
    """Each side is the cheapest on its own; only a peer wanted on both sides may make the pair dearer."""
    config, wanted = RoutingConfig(), swarm.request.wanted
    for peer in eligible(swarm.candidates, swarm.request, swarm.view):
        start, stop = max(peer.span.start, wanted.start), min(peer.span.stop, wanted.stop)
        found = route_through(peer, swarm.candidates, swarm.request, swarm.view, config)
        if found is None:
            continue
        hop = Hop(peer.peer_id, BlockSpan(start, stop))
        rivals = [route for route in every_route(swarm) if hop in route.hops]
        assert hop in found.hops
        if not any(_meets_itself(route, rival, hop) for route, rival in itertools.product([found], rivals)):
            costs = [route_cost(each, swarm.candidates, swarm.request, swarm.view) for each in rivals]
            assert route_cost(found, swarm.candidates, swarm.request, swarm.view) <= min(costs) + 1e-9


def _meets_itself(route: Route, rival: Route, hop: Hop) -> bool:
    """Whether a peer before the hop in one route comes after it in the other."""
    at, other = route.hops.index(hop), rival.hops.index(hop)
    return not set(route.peer_ids[:at]).isdisjoint(rival.peer_ids[other + 1 :])


def test_a_ledger_says_who_is_a_newcomer() -> None:
    ledger = Ledger(vouched=["proven"])
    policy = RiskAdjusted(RoutingConfig(explore_share=1.0), rng=random.Random(1))
    peers = [candidate("proven", tokens_per_s=12.0), candidate("new")]
    routes = ask_policy(policy, peers, REQUEST, ledger)
    assert routes[0].peer_ids == ("new",)
    assert routes[1].peer_ids == ("proven",)
