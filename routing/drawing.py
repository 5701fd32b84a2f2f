"""Routes drawn at random: block by block, among the peers that serve the next one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.view import ReputationView

from .eligibility import eligible, no_route
from .route import Candidate, Hop, Route, RouteRequest

Weigh = Callable[[Candidate, int], float]


def draw_routes(
    candidates: Sequence[Candidate],
    request: RouteRequest,
    view: ReputationView,
    weigh: Weigh,
    rng: random.Random,
    count: int = 1,
) -> list[Route]:
    """Routes of `count` draws, each once. A peer that is drawn is used to the end of its span.

    Args:
        weigh: A peer's chance, relative to the others', given how many blocks it takes off the way.

    Raises:
        NoRoute: Nobody usable serves some of the blocks.
    """
    usable = eligible(candidates, request, view)
    routes: dict[Route, None] = {}
    for _ in range(count):
        route = _draw(usable, request.wanted, weigh, rng)
        if route is None:
            raise no_route(candidates, request, view)
        routes[route] = None
    return list(routes)


def _draw(usable: Sequence[Candidate], wanted: BlockSpan, weigh: Weigh, rng: random.Random) -> Route | None:
    hops: list[Hop] = []
    block = wanted.start
    while block < wanted.stop:
        serving = [peer for peer in usable if peer.span.start <= block < peer.span.stop]
        if not serving:
            return None
        weights = [weigh(peer, min(peer.span.stop, wanted.stop) - block) for peer in serving]
        chosen = rng.choices(serving, weights)[0]
        hops.append(chosen.hop(BlockSpan(block, min(chosen.span.stop, wanted.stop))))
        block = hops[-1].span.stop
    return Route(tuple(hops))
