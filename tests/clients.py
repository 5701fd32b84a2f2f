"""Clients over a swarm in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from p2pinfer.client import Client
from p2pinfer.generation.generation import Generation
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.planner import cheapest_routes
from p2pinfer.routing.policy import RoutingPolicy
from p2pinfer.routing.route import Candidate, Route, RouteOutcome, RouteRequest

from .node.memory_swarm import MemorySwarm

PROMPT = "Once upon a time"

OpenClient = Callable[..., AbstractAsyncContextManager[tuple[Client, MemorySwarm]]]


class Recorder(RoutingPolicy):
    """The cheapest routes, with everything noted."""

    def __init__(self) -> None:
        self.requests: list[RouteRequest] = []
        self.candidates: list[Sequence[Candidate]] = []
        self.outcomes: list[tuple[Route, RouteOutcome]] = []

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        self.requests.append(request)
        self.candidates.append(candidates)
        return cheapest_routes(candidates, request, view)

    def on_result(self, route: Route, outcome: RouteOutcome) -> None:
        self.outcomes.append((route, outcome))


async def text_of(generation: Generation) -> str:
    async for _ in generation:
        pass
    return generation.result.text
