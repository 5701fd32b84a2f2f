"""Routes over peers that answer: nobody is asked for a session who has not been connected to.

An announcement costs its author a signature, and there may be a thousand of them without a peer behind any.
So a route is tried out before anything depends on it: its peers are connected to, and while one of them is
silent, others beside it, more at each turn. Whoever refuses is left out at once; whoever is slow to answer is
left out until it does, and counts again then. So an invented peer costs one short try, beside others, and a
session is opened as soon as some route is all there.

The others are taken in turns from those who told us of them and from address ranges (`routing/hearsay.py`),
since the policy's order follows what a peer claims.

Once peers that are connected make a route, the policy may still try its luck with others, but only its first
choice: if that does not answer, it chooses again among those that are there. After each such try in vain the
next one is put off, twice as long.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Final, TypeVar

import trio

from p2pinfer.errors import NoRoute, NotDialled, PeerError
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.span import BlockSpan, uncovered
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.node.transport.addresses import relays_of
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.hearsay import in_turns
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.failover import Gap

from .route_planner import RoutePlanner, SessionPlan

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 0.5  # for an answer, before others are tried beside; and the round trips that it takes:
CONNECT_ROUND_TRIPS: Final = 12.0  # TCP, Noise and yamux to a relay, a circuit, and both again through it
MOST_BESIDE: Final = 32  # peers that are tried at one turn beside those of the route
SEARCH_S: Final = 60.0  # for which the search goes on as long as somebody is left to be tried
# The same where peers are left out that failed: they were met, and are better than strangers without end.
SEARCH_WITHOUT_S: Final = 10.0

FIRST_LUCK_S: Final = 1.0  # between two tries of strangers where there are others, after one in vain
LAST_LUCK_S: Final = 300.0

_Plan = TypeVar("_Plan")


class ReachableRoutes:
    """Routes of a `RoutePlanner` whose peers are connected; a session's `Replanner`."""

    def __init__(self, planner: RoutePlanner, member: SwarmMember, spec: ModelSpec) -> None:
        self._planner = planner
        self._member = member
        self._revision = spec.revision
        self._all_blocks = BlockSpan(0, spec.num_blocks)
        self._luck = _Luck()

    async def plan_session(self, tokens: int, excluded: frozenset[str]) -> SessionPlan:
        """A route for all blocks, and what travels over it.

        Raises:
            NoRoute: There is none, or none whose peers answer.
        """

        async def choose(left_out: frozenset[str]) -> SessionPlan:
            return await self._planner.plan_session(tokens, excluded | left_out)

        return await self._search(self._all_blocks, excluded).run(choose, lambda plan: plan.route)

    async def find_replacement(self, gap: Gap) -> Route:
        """Hops for the blocks that a running session lost.

        Raises:
            NoRoute: Nobody else serves them, or nobody who answers.
        """

        async def choose(left_out: frozenset[str]) -> Route:
            return await self._planner.find_replacement(replace(gap, excluded=gap.excluded | left_out))

        return await self._search(gap.span, gap.excluded).run(choose, lambda route: route)

    async def find_faster(self, gap: Gap, hop: Hop, seconds: float) -> Route | None:
        """Hops to take over from one that takes so long for a step; None if it is best left alone.

        Raises:
            NoRoute: The policy has nobody at all.
        """
        route = await self._planner.find_faster(gap, hop, seconds)
        if route is None or not absent(self._member, route):
            return route
        # The slow hop works: nobody is waited for. Who answers in time is there at the next look.
        with trio.move_on_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for each in absent(self._member, route):
                    nursery.start_soon(self._connect_quietly, each)
        return None if absent(self._member, route) else route

    def hop_failed(self, route: Route, error: PeerError) -> None:
        """Note that a hop of `route` failed or refused, and tell the policy."""
        self._planner.hop_failed(route, error)

    def round_trip_s(self, route: Route) -> float:
        """Round trip to the farthest hop of a route, as far as it is known."""
        return max((self._member.host.rtt_s(each) or 0.0 for each in route.peer_ids), default=0.0)

    def _search(self, wanted: BlockSpan, excluded: frozenset[str]) -> _Search:
        return _Search(self._member, self._revision, wanted, excluded, self._luck, self._failed)

    def _failed(self, route: Route, error: PeerError) -> None:
        if not isinstance(error, NotDialled):
            self._planner.hop_failed(route, error)

    async def _connect_quietly(self, hop: Hop) -> None:
        try:
            await self._member.host.connect(hop.peer_id, hop.addrs, hearsay=True)
        except PeerError as exc:
            logger.debug("routes.not_faster peer=%s why=%s", hop.peer_id, exc)


def absent(member: SwarmMember, route: Route) -> list[Hop]:
    """The hops of a route that there is no connection to."""
    return [hop for hop in route.hops if member.host.connection_kind(hop.peer_id) is None]


class _Luck:
    """Tries of peers that nobody here is connected to, where others are: rarer after each one in vain."""

    def __init__(self) -> None:
        self._in_vain = 0
        self._again_at = float("-inf")

    def is_tried(self) -> bool:
        """True if a stranger may be tried."""
        return trio.current_time() >= self._again_at

    def note(self, *, found: bool) -> None:
        """A stranger was tried."""
        self._in_vain = 0 if found else self._in_vain + 1
        pause_s = 0.0 if found else min(FIRST_LUCK_S * 2.0 ** min(self._in_vain - 1, 32), LAST_LUCK_S)
        self._again_at = trio.current_time() + pause_s


class _Search:
    """One search for a route whose peers answer. `on_failed` hears of each hop of a route that does not."""

    def __init__(
        self,
        member: SwarmMember,
        revision: str,
        wanted: BlockSpan,
        excluded: frozenset[str],
        luck: _Luck,
        on_failed: Callable[[Route, PeerError], None],
    ) -> None:
        self._member = member
        self._revision = revision
        self._wanted = wanted
        self._excluded = excluded
        self._luck = luck
        self._on_failed = on_failed
        self._in_vain: set[str] = set()
        self._put_off: set[str] = set()  # the budget of dials had no room for them
        self._pending: set[str] = set()
        self._news = Pulse()
        self._last: PeerError | None = None

    async def run(
        self, choose: Callable[[frozenset[str]], Awaitable[_Plan]], route_of: Callable[[_Plan], Route]
    ) -> _Plan:
        """The first plan whose hops are all connected; `choose` makes one without the peers it is given."""
        search_s = SEARCH_WITHOUT_S if self._excluded else SEARCH_S
        deadline = trio.current_time() + search_s
        beside = turns = 0
        async with open_nursery() as nursery:
            while True:
                news = self._news.next
                try:
                    plan = await self._choose(choose, may_try=not turns and self._luck.is_tried())
                except NoRoute as exc:
                    if not await self._goes_on(news, deadline):
                        raise self._explained(exc) from exc
                    continue
                route = route_of(plan)
                tries_luck = not turns and bool(absent(self._member, route))
                turns += 1
                for hop in absent(self._member, route):
                    self._try(nursery, hop.peer_id, hop.addrs, route)
                for peer in self._others(route, beside):
                    self._try(nursery, peer.peer_id, peer.addrs, None)
                is_there = await self._is_there(route)
                if tries_luck:
                    self._luck.note(found=is_there)
                if is_there:
                    return plan
                if trio.current_time() >= deadline:
                    raise self._explained(
                        NoRoute(f"none of those that were tried answered in {search_s:g} s")
                    )
                beside = min(max(2 * beside, 2), MOST_BESIDE)

    async def _choose(self, choose: Callable[[frozenset[str]], Awaitable[_Plan]], *, may_try: bool) -> _Plan:
        """A plan over connected peers; over others too with `may_try`, or where those do not make one."""
        left_out = self._in_vain | self._put_off | self._pending
        if not may_try:
            strangers = {
                each.peer_id
                for each in self._member.announcements(self._revision)
                if self._member.host.connection_kind(each.peer_id) is None
            }
            with suppress(NoRoute):
                return await choose(frozenset(left_out | strangers))
        return await choose(frozenset(left_out))

    def _try(self, nursery: trio.Nursery, peer_id: str, addrs: tuple[str, ...], route: Route | None) -> None:
        if peer_id not in self._pending:
            self._pending.add(peer_id)
            nursery.start_soon(self._connect, peer_id, addrs, route)

    async def _connect(self, peer_id: str, addrs: tuple[str, ...], route: Route | None) -> None:
        try:
            await self._member.host.connect(peer_id, addrs, hearsay=True)
        except PeerError as exc:
            self._last = exc
            is_passing = isinstance(exc, NotDialled) and exc.is_passing
            (self._put_off if is_passing else self._in_vain).add(peer_id)
            if route is not None:
                self._on_failed(route, exc)
        finally:
            self._pending.discard(peer_id)
            self._news.fire()

    async def _is_there(self, route: Route) -> bool:
        """Wait for the route's hops for a moment; False as soon as one of them does not answer.

        Far hops, and hops behind far relays, have as much longer as the line makes of a connection's
        round trips. Nobody else has: a round trip counts once it was measured.
        """
        on_the_way = {relay for hop in route.hops for relay in relays_of(hop.addrs)}
        with self._member.host.within(PATIENCE_S, on_the_way.union(route.peer_ids), CONNECT_ROUND_TRIPS):
            while hops := absent(self._member, route):
                news = self._news.next
                if any(hop.peer_id not in self._pending for hop in hops):
                    return False
                await news.wait()
        return not absent(self._member, route)

    async def _goes_on(self, news: trio.Event, deadline: float) -> bool:
        """Wait until there may be a route again; False if nobody is left to hope for."""
        if trio.current_time() >= deadline:
            return False
        if news.is_set():  # somebody answered while the route was chosen, or failed
            return True
        if self._pending:
            with trio.move_on_at(deadline):
                await news.wait()
            return True
        if self._put_off:
            await trio.sleep(PATIENCE_S)
            self._put_off.clear()
            return True
        return False

    def _others(self, route: Route, most: int) -> Iterable[Announcement]:
        """Peers to try beside the route's: of blocks that nobody connected serves."""
        if not most:
            return ()
        member = self._member
        heard = in_turns(member.hearsay(self._revision))
        connected = set(member.host.connected_peers()) - self._excluded - self._in_vain
        served = [each.span for each in heard if each.peer_id in connected]
        gaps = [
            gap
            for gap in uncovered(served, max((each.span.stop for each in heard), default=0))
            if gap.start < self._wanted.stop and self._wanted.start < gap.stop
        ]
        left_out = {member.peer_id, *connected, *route.peer_ids, *self._excluded}
        left_out |= self._in_vain | self._put_off | self._pending
        due = [
            each
            for each in heard
            if each.peer_id not in left_out
            and any(gap.start < each.span.stop and each.span.start < gap.stop for gap in gaps)
            and not member.presence.is_silent(each)
        ]
        return due[:most]

    def _explained(self, error: NoRoute) -> NoRoute:
        if self._last is None:
            return error
        why = f"{error}; the last peer that was tried: {self._last}"
        return NoRoute(why, error.missing, is_full=error.is_full, reason=error.reason)
