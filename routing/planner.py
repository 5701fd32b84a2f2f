"""Planner: the cheapest chain of spans that covers every block.

Theory of operation. `cost.py` says what a route costs. Everything in that sum but the edges belongs to
single hops, and a hop's compute to single blocks, so the search runs over states "this peer is about to
run this block": from there the hidden state stays for the next block, or moves to another peer. Petals
searches a similar graph (client/routing/sequence_manager.py), but leaves a peer only at its span's end.

`_times_to_go` solves it backwards, block by block: Dijkstra without a heap, since every step leads to a
later block. States that cannot be part of a route as cheap as the best one that uses every peer to its
span's end are left out. The answer is exact but for one thing: a peer can be left and come back to.

A peer appears once in a route. Coming back could pay (a slow peer with every block around a fast one with
some of them), but it takes a second cache lease where room for one was announced, and lets one machine's
end tear two holes. Where the cheapest walk does come back, which is rare, A* finds the cheapest one that
does not, with the time to go as its estimate, which never exceeds the truth. It stops after `_MAX_STATES`,
so that no set of announcements keeps it busy for long; then the route that uses peers to their spans'
ends has to do, in which nobody can be come back to, and which exists whenever every block is served.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence

from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.view import ReputationView

from .config import RoutingConfig
from .cost import edge_s, hop_price
from .eligibility import eligible, no_route
from .route import Candidate, Route, RouteRequest

_MAX_STATES = 20_000  # some 50 ms

# Peers are indices here. A walk is (peer, first block) of every hop, in order.
_Walk = tuple[tuple[int, int], ...]
# By peer that is about to run a block: seconds from there to the sink, and the peer that runs the next one.
_Times = dict[int, tuple[float, int]]
_END = -1  # the request's source or sink


def plan_route(
    candidates: Sequence[Candidate],
    request: RouteRequest,
    view: ReputationView | None = None,
    config: RoutingConfig | None = None,
    rng: random.Random | None = None,
) -> Route:
    """The route with the least expected time per token, risk included.

    Args:
        view: Whom to believe; None takes everybody for honest and reliable.
        rng: Decides between routes of equal cost; without it, peer ids do.

    Raises:
        NoRoute: The eligible candidates do not cover the blocks wanted.
    """
    return cheapest_routes(candidates, request, view, config, rng=rng)[0]


def cheapest_routes(
    candidates: Sequence[Candidate],
    request: RouteRequest,
    view: ReputationView | None = None,
    config: RoutingConfig | None = None,
    count: int = 1,
    rng: random.Random | None = None,
) -> list[Route]:
    """The cheapest route, and up to `count - 1` alternatives of rising cost.

    Each one does without at least one peer of every route before it, and is the cheapest that does: what a
    failover needs. The next cheapest routes as such would be the same peers with a boundary moved by one.

    Raises:
        NoRoute: As `plan_route` does. Fewer routes than asked for are no error.
    """
    search = _Search(eligible(candidates, request, view), request, view, config or RoutingConfig(), rng)
    cheapest = search.cheapest(frozenset())
    if cheapest is None:
        raise no_route(candidates, request, view)
    # Best first over sets of peers to do without. Whatever follows the cheapest route of a set does without
    # one of that route's peers too.
    found: list[_Walk] = []
    frontier = [(cheapest[0], 0, frozenset[int](), cheapest[1])]
    tried = {frozenset[int]()}
    while frontier:
        _, _, avoided, walk = heapq.heappop(frontier)
        if not any(_peers(earlier) <= _peers(walk) for earlier in found):
            found.append(walk)
        if len(found) == count:
            break
        for avoid in (avoided | {peer} for peer, _ in walk):
            if avoid not in tried and (cheapest := search.cheapest(avoid)) is not None:
                heapq.heappush(frontier, (cheapest[0], len(tried), avoid, cheapest[1]))
            tried.add(avoid)
    return [search.route(walk) for walk in found]


class _Search:
    """One request's graph. Edges are priced when they are first looked at."""

    def __init__(
        self,
        candidates: list[Candidate],
        request: RouteRequest,
        view: ReputationView | None,
        config: RoutingConfig,
        rng: random.Random | None,
    ) -> None:
        if rng is not None:
            rng.shuffle(candidates)
        self._candidates = candidates
        self._request = request
        self._config = config
        self._prices = [hop_price(candidate, view, config) for candidate in candidates]
        # By start and end; the last row is the source's.
        self._arrivals: list[list[float | None]] = [
            [None] * len(candidates) for _ in range(len(candidates) + 1)
        ]
        self._first, self._last = request.wanted.start, request.wanted.stop - 1
        self._serving: dict[int, list[int]] = {block: [] for block in range(self._first, self._last + 1)}
        for peer, candidate in enumerate(candidates):
            for block in range(candidate.span.start, candidate.span.stop):
                if block in self._serving:
                    self._serving[block].append(peer)

        self._least_s = self._least_spent()

    def cheapest(self, avoided: frozenset[int]) -> tuple[float, _Walk] | None:
        """The cheapest walk without the peers `avoided` and its cost; None if there is no walk."""
        to_ends = self._follow(self._times_to_go(avoided, to_end=True))
        if to_ends is None:
            return None
        times = self._times_to_go(avoided, at_most_s=to_ends[0])
        cheapest = self._follow(times) or to_ends
        if len(_peers(cheapest[1])) == len(cheapest[1]):
            return cheapest
        # What `at_most_s` left out is dearer than `to_ends`, a walk without return, so none of it is missed.
        return self._without_return(times) or to_ends

    def route(self, walk: _Walk) -> Route:
        """The walk as hops."""
        stops = [start for _, start in walk[1:]] + [self._last + 1]
        return Route(
            tuple(
                self._candidates[peer].hop(BlockSpan(start, stop))
                for (peer, start), stop in zip(walk, stops, strict=True)
            )
        )

    def _times_to_go(
        self, avoided: frozenset[int], *, to_end: bool = False, at_most_s: float = math.inf
    ) -> list[_Times]:
        """Least time to go from each peer that may run a block, for every block wanted.

        Args:
            to_end: Leave a peer only at the end of its span.
            at_most_s: Leave out states that no walk as cheap as this one passes.
        """
        at_most_s *= 1 + 1e-9  # sums of the same numbers in another order
        times: list[_Times] = []
        following: _Times = {}
        for block in range(self._last, self._first - 1, -1):
            arrivals = self._sorted_arrivals(following)
            current: _Times = {}
            for peer in self._serving[block]:
                if peer in avoided:
                    continue
                if block == self._last:
                    onward = (self._edge_s(peer, _END), _END)
                else:
                    onward = self._onward(peer, following, arrivals, to_end=to_end)
                to_go_s = self._prices[peer].per_block_s + onward[0]
                if to_go_s < math.inf and self._least_s[block] + to_go_s <= at_most_s:
                    current[peer] = (to_go_s, onward[1])
            times.append(current)
            following = current
        times.reverse()
        return times

    def _least_spent(self) -> dict[int, float]:
        """Lower bound of what a walk has spent by the time a peer is about to run each block."""
        spent_s = min(
            (self._arrival_s(_END, peer) + self._prices[peer].fixed_s for peer in self._serving[self._first]),
            default=0.0,
        )
        least: dict[int, float] = {}
        for block, peers in self._serving.items():
            least[block] = spent_s
            spent_s += min((self._prices[peer].per_block_s for peer in peers), default=0.0)
        return least

    def _sorted_arrivals(self, following: _Times) -> list[tuple[float, int]]:
        """The time to go of whoever moves to each peer, but for the edge it moves over."""
        return sorted((self._prices[peer].fixed_s + to_go, peer) for peer, (to_go, _) in following.items())

    def _onward(
        self, peer: int, following: _Times, arrivals: list[tuple[float, int]], *, to_end: bool
    ) -> tuple[float, int]:
        """The least time to go for `peer` once it has run a block, and who runs the next one."""
        best_s, chosen = following[peer][0] if peer in following else math.inf, peer
        if to_end and peer in following:
            return best_s, chosen
        priced = self._arrivals[peer]
        for to_go, other in arrivals:
            # Sorted, so nothing that follows is better. Most peers with the next block stay right here.
            if to_go >= best_s:
                break
            arrival_s = priced[other]
            total_s = to_go + (self._arrival_s(peer, other) if arrival_s is None else arrival_s)
            if total_s < best_s:
                best_s, chosen = total_s, other
        return best_s, chosen

    def _follow(self, times: list[_Times]) -> tuple[float, _Walk] | None:
        """The walk that `times` stand for, from the source on, and its cost."""
        total_s, peer = self._onward(_END, times[0], self._sorted_arrivals(times[0]), to_end=False)
        if total_s == math.inf:
            return None
        walk = [(peer, self._first)]
        for block, current in enumerate(times[:-1], start=self._first):
            following = current[peer][1]
            if following != peer:
                walk.append((following, block + 1))
                peer = following
        return total_s, tuple(walk)

    def _without_return(self, times: list[_Times]) -> tuple[float, _Walk] | None:
        """The cheapest walk that never comes back to a peer; None if it was not found in time."""
        # By estimate, then by age: equal estimates never compare walks, and the result is the same
        # everywhere.
        heap: list[tuple[float, int, float, int, _Walk]] = []
        pushed = 0

        def push(estimate_s: float, spent_s: float, block: int, walk: _Walk) -> None:
            nonlocal pushed
            pushed += 1
            heapq.heappush(heap, (estimate_s, pushed, spent_s, block, walk))

        def push_arrivals(spent_s: float, block: int, walk: _Walk) -> None:
            current = walk[-1][0] if walk else _END
            used = _peers(walk)
            for peer, (to_go, _) in times[block - self._first].items():
                if peer not in used:
                    arrived_s = spent_s + self._arrival_s(current, peer) + self._prices[peer].fixed_s
                    push(arrived_s + to_go, arrived_s, block, (*walk, (peer, block)))

        push_arrivals(0.0, self._first, ())
        expanded: set[tuple[int, int, frozenset[int]]] = set()
        # The budget counts states, not time: the same announcements give the same route on every machine.
        while heap and pushed < _MAX_STATES:
            estimate_s, _, spent_s, block, walk = heapq.heappop(heap)
            # A complete walk goes through the heap as well. Returned when it is found, it might not be the
            # cheapest: estimates ignore the ban on returns, so they are never too high, and only the order of
            # the heap proves it.
            if block > self._last:
                return estimate_s, walk
            peer = walk[-1][0]
            # The peers used are part of the state. With (block, peer) alone, as in plain A*, the cheaper of
            # two walks would hide the dearer one, which may be the only one that can still go on without a
            # return.
            state = (block, peer, _peers(walk))
            if state in expanded:
                continue
            expanded.add(state)
            spent_s += self._prices[peer].per_block_s
            if block == self._last:
                push(spent_s + self._edge_s(peer, _END), spent_s, block + 1, walk)
                continue
            following = times[block + 1 - self._first]
            if peer in following:
                push(spent_s + following[peer][0], spent_s, block + 1, walk)
            push_arrivals(spent_s, block + 1, walk)
        return None

    def _arrival_s(self, start: int, end: int) -> float:
        """The price of the edge into `end`, its risk included."""
        seconds = self._arrivals[start][end]
        if seconds is None:
            seconds = self._edge_s(start, end) * self._prices[end].edge_factor
            self._arrivals[start][end] = seconds
        return seconds

    def _edge_s(self, start: int, end: int) -> float:
        source = self._request.source if start == _END else self._candidates[start]
        sink = self._request.sink if end == _END else self._candidates[end]
        return edge_s(source, sink, self._request, self._config)


def _peers(walk: _Walk) -> frozenset[int]:
    return frozenset(peer for peer, _ in walk)
