import math
from dataclasses import dataclass, field, replace

import pytest

from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.score import Score
from p2pinfer.routing.announcement import Announcement, Nat, Reachability
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.coordinates import Coordinate
from p2pinfer.routing.cost import edge_s, hop_price, route_cost
from p2pinfer.routing.route import Candidate, Edge, Hop, Route, RouteRequest

REVISION = "a" * 32
CONFIG = RoutingConfig(
    redo_s=0.5,
    integrity_weight_s=0.2,
    min_reliability=0.1,
    hop_overhead_s=0.001,
    default_rtt_ms=80.0,
    max_coordinate_error=0.7,
    bandwidth_bytes_per_s=1e6,
    relay_bandwidth_bytes_per_s=1e5,
    relay_detour_s=0.03,
    punch_failure=0.5,
)
REQUEST = RouteRequest(REVISION, num_blocks=8, hidden_bytes_per_token=1000, tokens=10)
TRANSFER_S, RELAYED_TRANSFER_S = 0.001, 0.01


@dataclass
class Scores:
    by_peer: dict[str, Score] = field(default_factory=dict[str, Score])

    def score(self, peer_id: str) -> Score:
        return self.by_peer[peer_id]

    def is_banned(self, peer_id: str) -> bool:
        return False


def candidate(
    peer_id: str,
    span: BlockSpan = BlockSpan(0, 8),
    tokens_per_s: float = 10.0,
    *,
    coordinate: Coordinate | None = None,
    reachability: Reachability = "public",
    rtt_ms: float | None = None,
    relayed: bool = False,
) -> Candidate:
    announcement = Announcement(
        peer_id, "m", REVISION, span, "float32", tokens_per_s, 100, 1, reachability, coordinate=coordinate
    )
    return Candidate(announcement, rtt_ms, relayed)


def test_a_route_costs_what_the_formula_says() -> None:
    """T = sum [lat + (1 - r) redo] / r + V (1 - integrity), and the way back."""
    a, b = (
        candidate("a", BlockSpan(0, 4), 20.0, rtt_ms=40.0),
        candidate("b", BlockSpan(2, 8), 10.0, rtt_ms=60.0),
    )
    request = replace(REQUEST, edges={("b", "a"): Edge(rtt_ms=10.0)})
    view = Scores({"a": Score(integrity=0.9, reliability=0.8), "b": Score(integrity=0.5, reliability=0.5)})
    route = Route((Hop("a", BlockSpan(0, 3)), Hop("b", BlockSpan(3, 8))))
    lat_a = 0.001 + (1 / 20) * 3 / 4 + 0.020 + TRANSFER_S
    lat_b = 0.001 + (1 / 10) * 5 / 6 + 0.005 + TRANSFER_S
    expected = (
        (lat_a + 0.2 * 0.5) / 0.8 + 0.2 * 0.1 + (lat_b + 0.5 * 0.5) / 0.5 + 0.2 * 0.5 + 0.030 + TRANSFER_S
    )
    assert route_cost(route, [a, b], request, view, CONFIG) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("one", "other", "relayed"),
    [
        ("symmetric", "port-preserving", True),
        ("port-preserving", "symmetric", True),
        ("port-preserving", "port-preserving", False),
    ],
)
def test_where_no_hole_can_be_punched_an_edge_costs_a_relay(one: Nat, other: Nat, relayed: bool) -> None:
    a, b = candidate("a", reachability="private"), candidate("b", reachability="private")
    a = replace(a, announcement=replace(a.announcement, nat=one))
    b = replace(b, announcement=replace(b.announcement, nat=other))
    detour_s, transfer_s = (0.03, RELAYED_TRANSFER_S) if relayed else (0.015, TRANSFER_S)
    assert edge_s(a, b, REQUEST, CONFIG) == pytest.approx(0.040 + detour_s + transfer_s)
    public = candidate("c")
    assert edge_s(a, public, REQUEST, CONFIG) == pytest.approx(0.040 + TRANSFER_S)


def test_without_a_view_there_is_no_risk() -> None:
    price = hop_price(candidate("a"), None, CONFIG)
    assert price.edge_factor == 1.0
    assert price.fixed_s == CONFIG.hop_overhead_s


def test_what_was_measured_of_a_peer_replaces_what_it_says() -> None:
    measured = replace(candidate("a", tokens_per_s=1e6), compute_ms=80.0)
    assert hop_price(measured, None, CONFIG).per_block_s == pytest.approx(0.010)


@pytest.mark.parametrize("nonsense", [-1.0, 2.0, math.nan, math.inf])
def test_scores_out_of_range_still_give_finite_prices(nonsense: float) -> None:
    price = hop_price(candidate("a"), Scores({"a": Score(nonsense, nonsense)}), CONFIG)
    assert 0 < price.fixed_s < 10 and 0 < price.per_block_s < 10 and 1 <= price.edge_factor <= 10


def test_a_measured_edge_counts_before_coordinates() -> None:
    place = Coordinate(0, 0, 0, 1, 0.1)
    a, b = candidate("a", coordinate=place), candidate("b", coordinate=place._replace(x_ms=100.0))
    assert edge_s(a, b, REQUEST, CONFIG) == pytest.approx(0.051 + TRANSFER_S)
    request = replace(REQUEST, edges={("a", "b"): Edge(rtt_ms=30.0)})
    assert edge_s(a, b, request, CONFIG) == pytest.approx(0.015 + TRANSFER_S)
    assert edge_s(b, a, request, CONFIG) == edge_s(a, b, request, CONFIG)


def test_the_client_has_coordinates_too() -> None:
    place = Coordinate(0, 0, 0, 1, 0.1)
    a = candidate("a", coordinate=place._replace(y_ms=50.0))
    assert edge_s(None, a, replace(REQUEST, coordinate=place), CONFIG) == pytest.approx(0.026 + TRANSFER_S)


def test_unknown_or_uncertain_places_are_at_the_default_distance() -> None:
    place = Coordinate(0, 0, 0, 1, 0.1)
    sure, unsure = candidate("a", coordinate=place), candidate("b", coordinate=place._replace(error=0.9))
    assert edge_s(sure, unsure, REQUEST, CONFIG) == pytest.approx(0.040 + TRANSFER_S)
    assert edge_s(sure, candidate("c"), REQUEST, CONFIG) == pytest.approx(0.040 + TRANSFER_S)
    assert edge_s(None, sure, REQUEST, CONFIG) == pytest.approx(0.040 + TRANSFER_S)


def test_a_relayed_edge_pays_its_detour_unless_it_was_measured_and_the_relays_bandwidth_always() -> None:
    guessed = candidate("a", relayed=True)
    assert edge_s(None, guessed, REQUEST, CONFIG) == pytest.approx(0.040 + 0.03 + RELAYED_TRANSFER_S)
    measured = candidate("a", relayed=True, rtt_ms=120.0)
    assert edge_s(measured, None, REQUEST, CONFIG) == pytest.approx(0.060 + RELAYED_TRANSFER_S)
    request = replace(REQUEST, edges={("a", "b"): Edge(rtt_ms=50.0, relayed=True)})
    between = edge_s(candidate("a"), candidate("b"), request, CONFIG)
    assert between == pytest.approx(0.025 + RELAYED_TRANSFER_S)


def test_two_private_peers_pay_for_the_chance_that_they_cannot_punch() -> None:
    a, b = candidate("a", reachability="private"), candidate("b", reachability="private")
    assert edge_s(a, b, REQUEST, CONFIG) == pytest.approx(0.040 + 0.015 + TRANSFER_S)
    assert edge_s(a, candidate("c"), REQUEST, CONFIG) == pytest.approx(0.040 + TRANSFER_S)


def test_a_part_of_a_route_is_priced_between_its_neighbours() -> None:
    before, peer, after = (candidate(name) for name in ("before", "peer", "after"))
    request = replace(
        REQUEST,
        span=BlockSpan(2, 6),
        source=before,
        sink=after,
        edges={("before", "peer"): Edge(10.0), ("peer", "after"): Edge(20.0)},
    )
    cost = route_cost(Route((Hop("peer", BlockSpan(2, 6)),)), [peer], request, None, CONFIG)
    assert cost == pytest.approx(0.001 + 0.05 + 0.005 + TRANSFER_S + 0.010 + TRANSFER_S)


def test_between_the_client_and_itself_the_default_distance_is_assumed() -> None:
    assert edge_s(None, None, REQUEST, CONFIG) == pytest.approx(0.040 + TRANSFER_S)
