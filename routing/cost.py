"""Costs of a hop, an edge and a route, in expected seconds per decoded token.

A route's cost is `T = sum over hops of [lat + (1 - r) * redo] / r + V * (1 - integrity)`, plus the edge from
the last hop back to the client. `lat` is the hop's overhead and compute, and the edge into it; `r` its
reliability. An edge is its one-way delay and the time its bytes take. Whoever is to be shunned costs so much
more that any other route is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from p2pinfer.reputation.score import Score
from p2pinfer.reputation.view import ReputationView

from .config import RoutingConfig
from .coordinates import Coordinate, distance_ms
from .route import Candidate, Route, RouteRequest

_FAULTLESS = Score(integrity=1.0, reliability=1.0)


@dataclass(frozen=True, slots=True)
class HopPrice:
    """A hop's cost, taken apart: `fixed_s + blocks * per_block_s + edge into it * edge_factor`."""

    fixed_s: float
    per_block_s: float
    edge_factor: float


def hop_price(candidate: Candidate, view: ReputationView | None, config: RoutingConfig) -> HopPrice:
    """Price of using a peer. Without a view nobody fails and nobody lies."""
    score = _FAULTLESS if view is None else view.score(candidate.peer_id)
    reliability = min(max(config.min_reliability, score.reliability), 1.0)
    integrity = min(max(0.0, score.integrity), 1.0)
    if candidate.compute_ms is None:
        compute_s = 1.0 / candidate.announcement.tokens_per_s
    else:
        compute_s = candidate.compute_ms / 1000
    return HopPrice(
        fixed_s=(config.hop_overhead_s + (1.0 - reliability) * config.redo_s) / reliability
        + config.integrity_weight_s * (1.0 - integrity)
        + config.shunned_s * score.is_shunned,
        per_block_s=compute_s / len(candidate.span) / reliability,
        edge_factor=1.0 / reliability,
    )


def edge_s(
    start: Candidate | None, end: Candidate | None, request: RouteRequest, config: RoutingConfig
) -> float:
    """The time one token's hidden state takes from `start` to `end`; None is the client."""
    rtt_ms, relayed = _measured(start, end, request)
    detour_s = 0.0
    if rtt_ms is None:
        rtt_ms = _predicted_rtt_ms(_place(start, request), _place(end, request), config)
        if rtt_ms is None:
            rtt_ms = config.default_rtt_ms
        relayed = relayed or _must_be_relayed(start, end)
        if relayed:
            detour_s = config.relay_detour_s
        elif _is_private(start) and _is_private(end):
            detour_s = config.relay_detour_s * config.punch_failure
    bandwidth = config.relay_bandwidth_bytes_per_s if relayed else config.bandwidth_bytes_per_s
    return rtt_ms / 2000 + detour_s + request.hidden_bytes_per_token / bandwidth


def route_cost(
    route: Route,
    candidates: Sequence[Candidate],
    request: RouteRequest,
    view: ReputationView | None = None,
    config: RoutingConfig | None = None,
) -> float:
    """The route's expected seconds per token. Every hop must be one of the candidates."""
    config = config or RoutingConfig()
    by_id = {candidate.peer_id: candidate for candidate in candidates}
    total_s = 0.0
    before = request.source
    for hop in route.hops:
        candidate = by_id[hop.peer_id]
        price = hop_price(candidate, view, config)
        total_s += price.fixed_s + len(hop.span) * price.per_block_s
        total_s += edge_s(before, candidate, request, config) * price.edge_factor
        before = candidate
    return total_s + edge_s(before, request.sink, request, config)


def edges_are_known(
    route: Route, candidates: Sequence[Candidate], request: RouteRequest, config: RoutingConfig | None = None
) -> bool:
    """True if each edge was measured or follows from coordinates, so that none goes by the default."""
    config = config or RoutingConfig()
    by_id = {candidate.peer_id: candidate for candidate in candidates}
    places = [request.source, *(by_id[hop.peer_id] for hop in route.hops), request.sink]
    return all(
        _measured(start, end, request)[0] is not None
        or _predicted_rtt_ms(_place(start, request), _place(end, request), config) is not None
        for start, end in pairwise(places)
    )


def _measured(
    start: Candidate | None, end: Candidate | None, request: RouteRequest
) -> tuple[float | None, bool]:
    """The measured round trip, None if there is none, and whether a relay is known to be in between."""
    if start is not None and end is not None:
        edges = request.edges
        edge = edges.get((start.peer_id, end.peer_id)) or edges.get((end.peer_id, start.peer_id))
        return (None, False) if edge is None else (edge.rtt_ms, edge.relayed)
    peer = start or end
    return (None, False) if peer is None else (peer.rtt_ms, peer.relayed)


def _place(peer: Candidate | None, request: RouteRequest) -> Coordinate | None:
    return request.coordinate if peer is None else peer.announcement.coordinate


def _predicted_rtt_ms(a: Coordinate | None, b: Coordinate | None, config: RoutingConfig) -> float | None:
    if a is None or b is None or max(a.error, b.error) > config.max_coordinate_error:
        return None
    return distance_ms(a, b)


def _must_be_relayed(start: Candidate | None, end: Candidate | None) -> bool:
    """True if no hole can be punched: neither can be dialled, and one's port is not known beforehand."""
    if not (_is_private(start) and _is_private(end)):
        return False
    return any(peer is not None and peer.announcement.nat == "symmetric" for peer in (start, end))


def _is_private(peer: Candidate | None) -> bool:
    return peer is not None and peer.announcement.reachability == "private"
