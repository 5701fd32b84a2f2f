"""A routing policy that goes the way laid down in the environment: a scenario decides who talks to whom.

`LAB_ROUTE` is `peer=start:stop,peer=start:stop`; after a semicolon, the route for when a peer failed.
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
POLICY = "tests.lab.pinned:Pinned"

WrittenRoute = Sequence[tuple[str, str]]  # peer id and span, hop by hop


def write_routes(*routes: WrittenRoute) -> str:
    """The variable's value."""
    return ";".join(",".join(f"{peer}={span}" for peer, span in hops) for hops in routes)


class Pinned(RoutingPolicy):
    """The first of the routes whose peers are all there and have not failed."""

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        known = {candidate.peer_id: candidate for candidate in candidates if can_be_dialled(candidate)}
        usable = known.keys() - set(request.excluded)
        for route in os.environ[VARIABLE].split(";"):
            hops = [hop.split("=") for hop in route.split(",")]
            if usable.issuperset(peer for peer, _ in hops):
                return [Route(tuple(known[peer].hop(BlockSpan.parse(span)) for peer, span in hops))]
        absent = [candidate.peer_id for candidate in candidates if candidate.peer_id not in known]
        raise NoRoute(
            f"no pinned route is there; failed: {sorted(request.excluded)}, not announced: {absent}"
        )


def can_be_dialled(candidate: Candidate) -> bool:
    """Whether a peer has found out, and announced, where it can be reached: that takes it a few seconds."""
    reached = candidate.announcement.reachability in ("public", "mapped")
    return reached or any("/p2p-circuit" in address for address in candidate.announcement.addrs)
