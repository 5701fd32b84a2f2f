"""A routing policy that goes the way laid down in the environment: a scenario decides who talks to whom.

`LAB_ROUTE` is `peer=start:stop,peer=start:stop`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from p2pinfer.errors import NoRoute
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.routing.route import Candidate, Route, RouteRequest

VARIABLE = "LAB_ROUTE"


def write_route(hops: Sequence[tuple[str, str]]) -> str:
    """The variable's value for hops of (peer id, span)."""
    return ",".join(f"{peer}={span}" for peer, span in hops)


class Pinned(RoutingPolicy):
    """The one route, as often as it is asked for."""

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        known = {candidate.peer_id: candidate for candidate in candidates}
        hops = [hop.split("=") for hop in os.environ[VARIABLE].split(",")]
        missing = [peer for peer, _ in hops if peer not in known]
        if missing:
            raise NoRoute(f"not here yet: {', '.join(missing)}")
        return [Route(tuple(known[peer].hop(BlockSpan.parse(span)) for peer, span in hops))]
