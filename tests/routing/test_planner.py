import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.errors import NoRoute
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.score import Score
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing import planner
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.coordinates import Coordinate
from p2pinfer.routing.cost import route_cost
from p2pinfer.routing.planner import cheapest_routes, plan_route
from p2pinfer.routing.route import Candidate, Edge, Hop, Route, RouteRequest

REVISION = "a" * 32
CONFIG = RoutingConfig()


@dataclass
class Scores:
    by_peer: dict[str, Score] = field(default_factory=dict[str, Score])
    banned: frozenset[str] = frozenset()

    def score(self, peer_id: str) -> Score:
        return self.by_peer.get(peer_id, Score(1.0, 1.0))

    def is_banned(self, peer_id: str) -> bool:
        return peer_id in self.banned


@dataclass
class Swarm:
    candidates: list[Candidate]
    request: RouteRequest
    view: Scores


def candidate(peer_id: str, start: int, stop: int, tokens_per_s: float = 10.0, free: int = 1000) -> Candidate:
    return Candidate(
        Announcement(peer_id, "m", REVISION, BlockSpan(start, stop), "float32", tokens_per_s, free, 1)
    )


def request(num_blocks: int, excluded: frozenset[str] = frozenset()) -> RouteRequest:
    return RouteRequest(REVISION, num_blocks, 4096, tokens=100, excluded=excluded)


def hops(route: Route) -> list[tuple[str, int, int]]:
    return [(hop.peer_id, hop.span.start, hop.span.stop) for hop in route.hops]


places = st.none() | st.builds(
    Coordinate,
    st.floats(-99, 99),
    st.floats(-99, 99),
    st.just(0.0),
    st.floats(1, 20),
    st.sampled_from([0.2, 0.9]),
)


@st.composite
def swarms(draw: st.DrawFn, max_peers: int = 5, max_blocks: int = 5) -> Swarm:
    num_blocks = draw(st.integers(1, max_blocks))
    peers: list[Candidate] = []
    for i in range(draw(st.integers(1, max_peers))):
        start = draw(st.integers(0, num_blocks - 1))
        announcement = Announcement(
            f"p{i}",
            "m",
            REVISION,
            BlockSpan(start, draw(st.integers(start + 1, num_blocks))),
            "float32",
            draw(st.sampled_from([0.5, 5.0, 50.0, 500.0])),
            draw(st.sampled_from([1000, 1000, 1000, 99])),
            1,
            draw(st.sampled_from(["public", "private"])),
            coordinate=draw(places),
        )
        rtt_ms = draw(st.none() | st.floats(0.1, 300))
        peers.append(Candidate(announcement, rtt_ms, relayed=draw(st.booleans())))
    pairs = [(a.peer_id, b.peer_id) for a in peers for b in peers if a.peer_id < b.peer_id]
    edge = st.builds(Edge, st.floats(0.1, 500), st.booleans())
    edges = draw(st.dictionaries(st.sampled_from(pairs), edge)) if pairs else {}
    share = st.floats(0, 1)
    scores = {peer.peer_id: Score(draw(share), draw(share)) for peer in peers}
    wanted = replace(request(num_blocks), coordinate=draw(places), edges=edges)
    if draw(st.booleans()):
        start = draw(st.integers(0, num_blocks - 1))
        span = BlockSpan(start, draw(st.integers(start + 1, num_blocks)))
        wanted = replace(wanted, span=span, source=candidate("before", 0, 1), sink=candidate("after", 0, 1))
    names = st.frozensets(st.sampled_from([peer.peer_id for peer in peers]), max_size=1)
    return Swarm(peers, replace(wanted, excluded=draw(names)), Scores(scores, draw(names)))


@st.composite
def swarms_that_invite_to_come_back(draw: st.DrawFn) -> Swarm:
    """Slow peers with every block, fast ones with few, and hardly any distance."""
    num_blocks = draw(st.integers(3, 6))
    peers = [candidate(f"wide{i}", 0, num_blocks, draw(st.sampled_from([0.5, 1.0]))) for i in range(2)]
    for i in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, num_blocks - 1))
        stop = min(start + draw(st.integers(1, 3)), num_blocks)
        peers.append(candidate(f"narrow{i}", start, stop, draw(st.sampled_from([5.0, 500.0]))))
    edges = {(a.peer_id, b.peer_id): Edge(draw(st.floats(0.1, 20))) for a in peers for b in peers}
    peers = [replace(peer, rtt_ms=draw(st.floats(0.1, 20))) for peer in peers]
    return Swarm(peers, replace(request(num_blocks), edges=edges), Scores())


def every_route(swarm: Swarm, start: int | None = None, used: tuple[Hop, ...] = ()) -> Iterator[Route]:
    """All there are, by the rules and nothing else."""
    wanted = swarm.request.wanted
    start = wanted.start if start is None else start
    if start == wanted.stop:
        yield Route(used)
        return
    for peer in swarm.candidates:
        allowed = (
            peer.announcement.free_cache_tokens >= swarm.request.tokens
            and peer.peer_id not in swarm.request.excluded
            and not swarm.view.is_banned(peer.peer_id)
            and all(hop.peer_id != peer.peer_id for hop in used)
        )
        if allowed and peer.span.start <= start < peer.span.stop:
            for stop in range(start + 1, min(peer.span.stop, wanted.stop) + 1):
                yield from every_route(swarm, stop, (*used, Hop(peer.peer_id, BlockSpan(start, stop))))


def naive_edge_s(swarm: Swarm, a: Candidate | None, b: Candidate | None) -> float:
    asked = swarm.request
    if a and b:
        known = asked.edges.get((a.peer_id, b.peer_id)) or asked.edges.get((b.peer_id, a.peer_id))
        rtt_ms, relayed = (known.rtt_ms, known.relayed) if known else (None, False)
        both_private = a.announcement.reachability == b.announcement.reachability == "private"
    else:
        peer = a or b
        assert peer is not None
        rtt_ms, relayed, both_private = peer.rtt_ms, peer.relayed, False
    seconds = 4096 / (0.5e6 if relayed else 2.5e6)
    if rtt_ms is not None:
        return seconds + rtt_ms / 1000 / 2
    p = a.announcement.coordinate if a else asked.coordinate
    q = b.announcement.coordinate if b else asked.coordinate
    rtt_ms = 100.0
    if p and q and p.error <= 0.7 and q.error <= 0.7:
        rtt_ms = math.hypot(p[0] - q[0], p[1] - q[1], p[2] - q[2]) + p.height_ms + q.height_ms
    detour = 0.04 if relayed else 0.04 * 0.3 if both_private else 0.0
    return seconds + rtt_ms / 1000 / 2 + detour


def naive_cost(swarm: Swarm, route: Route) -> float:
    by_id = {peer.peer_id: peer for peer in swarm.candidates}
    total, before = 0.0, swarm.request.source
    for hop in route.hops:
        peer, score = by_id[hop.peer_id], swarm.view.score(hop.peer_id)
        r = max(score.reliability, 0.05)
        compute = len(hop.span) / len(peer.span) / peer.announcement.tokens_per_s
        lat = 0.002 + compute + naive_edge_s(swarm, before, peer)
        total += (lat + (1 - r) * 0.25) / r + 0.03 * (1 - score.integrity)
        before = peer
    return total + naive_edge_s(swarm, before, swarm.request.sink)


@settings(max_examples=400, deadline=None)
@given(swarms() | swarms_that_invite_to_come_back())
def test_the_planner_equals_brute_force(swarm: Swarm) -> None:
    every = list(every_route(swarm))
    if not every:
        with pytest.raises(NoRoute):
            plan_route(swarm.candidates, swarm.request, swarm.view)
        return
    planned = plan_route(swarm.candidates, swarm.request, swarm.view)
    assert planned in every
    assert naive_cost(swarm, planned) == pytest.approx(min(naive_cost(swarm, route) for route in every))
    assert route_cost(planned, swarm.candidates, swarm.request, swarm.view) == pytest.approx(
        naive_cost(swarm, planned)
    )


@settings(max_examples=200, deadline=None)
@given(swarms() | swarms_that_invite_to_come_back(), st.integers(1, 4))
def test_alternatives_equal_brute_force(swarm: Swarm, count: int) -> None:
    """Each is the cheapest route that does without a peer of every route before it."""
    every = list(every_route(swarm))
    if not every:
        return
    routes = cheapest_routes(swarm.candidates, swarm.request, swarm.view, count=count)
    for rank in range(count):
        before = [set(route.peer_ids) for route in routes[:rank]]
        different = [route for route in every if all(peers - set(route.peer_ids) for peers in before)]
        if rank == len(routes):
            assert not different
            return
        assert routes[rank] in different
        best = min(naive_cost(swarm, route) for route in different)
        assert naive_cost(swarm, routes[rank]) == pytest.approx(best)


@settings(max_examples=50, deadline=None)
@given(swarms(), st.integers(0, 99))
def test_chance_decides_only_between_equals(swarm: Swarm, seed: int) -> None:
    if not any(every_route(swarm)):
        return
    fixed = plan_route(swarm.candidates, swarm.request, swarm.view)
    drawn = plan_route(swarm.candidates, swarm.request, swarm.view, rng=random.Random(seed))
    assert naive_cost(swarm, drawn) == pytest.approx(naive_cost(swarm, fixed))


def test_ties_go_to_the_first_peer_id_or_to_chance() -> None:
    twins = [candidate(name, 0, 4) for name in ("b", "a", "c")]
    assert hops(plan_route(twins, request(4))) == [("a", 0, 4)]
    assert hops(plan_route(twins[::-1], request(4))) == [("a", 0, 4)]
    drawn = {hops(plan_route(twins, request(4), rng=random.Random(seed)))[0][0] for seed in range(30)}
    assert drawn == {"a", "b", "c"}


def test_a_peer_can_be_used_for_less_than_it_serves() -> None:
    slow, fast = candidate("slow", 0, 8, 0.1), candidate("fast", 3, 8, 100.0)
    assert hops(plan_route([slow, fast], request(8))) == [("slow", 0, 3), ("fast", 3, 8)]


def test_a_peer_is_not_come_back_to_even_where_that_would_be_fastest() -> None:
    around, inside = candidate("around", 0, 6, 1.0), candidate("inside", 2, 4, 1000.0)
    assert hops(plan_route([around, inside], request(6))) == [("around", 0, 6)]
    end = candidate("end", 3, 6, 1000.0)
    assert hops(plan_route([around, inside, end], request(6))) == [
        ("around", 0, 2),
        ("inside", 2, 3),
        ("end", 3, 6),
    ]


def test_when_the_search_takes_too_long_peers_are_used_to_the_end_of_their_spans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peers = [candidate("around", 0, 6, 1.0), candidate("inside", 2, 4, 1000.0), candidate("end", 4, 6, 2.5)]
    exact = plan_route(peers, request(6))
    assert hops(exact) == [("around", 0, 2), ("inside", 2, 4), ("end", 4, 6)]
    monkeypatch.setattr(planner, "_MAX_STATES", 0)
    assert hops(plan_route(peers, request(6))) == [("around", 0, 6)]


def test_the_reliable_peer_is_preferred_to_a_slightly_faster_one() -> None:
    peers = [candidate("fickle", 0, 4, 11.0), candidate("steady", 0, 4, 10.0)]
    view = Scores({"fickle": Score(1.0, 0.7), "steady": Score(1.0, 0.99)})
    assert hops(plan_route(peers, request(4), view)) == [("steady", 0, 4)]
    assert hops(plan_route(peers, request(4))) == [("fickle", 0, 4)]


def test_banned_excluded_and_full_peers_are_left_out() -> None:
    peers = [
        candidate("banned", 0, 4, 90.0),
        candidate("out", 0, 4, 80.0),
        candidate("full", 0, 4, 70.0, free=99),
    ]
    last = candidate("last", 0, 4, 1.0)
    asked = request(4, frozenset({"out"}))
    routes = cheapest_routes([*peers, last], asked, Scores(banned=frozenset({"banned"})), count=4)
    assert list(map(hops, routes)) == [[("last", 0, 4)]]


def test_the_cheapest_alternative_does_without_one_peer_of_each_route_before() -> None:
    peers = [candidate("a", 0, 4, 40.0), candidate("b", 4, 8, 40.0), candidate("c", 4, 8, 30.0)]
    routes = cheapest_routes([*peers, candidate("d", 0, 4, 1.0)], request(8), count=9)
    assert [route.peer_ids for route in routes] == [("a", "b"), ("a", "c"), ("d", "b"), ("d", "c")]


def test_hops_carry_the_addresses_of_their_peers() -> None:
    peer = candidate("a", 0, 4)
    peer = replace(peer, announcement=replace(peer.announcement, addrs=("/ip4/192.0.2.1/tcp/1",)))
    assert plan_route([peer], request(4)).hops[0].addrs == ("/ip4/192.0.2.1/tcp/1",)


def test_a_swarm_of_two_hundred_peers_is_planned_in_no_time() -> None:
    """Some 10 ms on an idle core; the bound leaves room for a busy machine."""
    rng = random.Random(1)
    peers = [dispersed(rng, i) for i in range(200)]
    asked = replace(request(80), coordinate=Coordinate(0, 0, 0, 5, 0.2))
    views: list[ReputationView | None] = [None, Ledger()]
    for view in views:
        started = time.process_time()
        route = plan_route(peers, asked, view)
        assert time.process_time() - started < 0.25
        assert sum(len(hop.span) for hop in route.hops) == 80


def dispersed(rng: random.Random, i: int) -> Candidate:
    width = rng.randint(4, 20)
    start = min(max(rng.randint(-width, 80), 0), 80 - width)
    place = Coordinate(rng.uniform(-99, 99), rng.uniform(-99, 99), 0.0, rng.uniform(1, 20), 0.2)
    peer = candidate(f"p{i:03}", start, start + width, rng.uniform(5, 300) * 8 / width)
    return replace(peer, announcement=replace(peer.announcement, coordinate=place))
