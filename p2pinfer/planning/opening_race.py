"""Race of routes for a session: the first that opens is used.

A peer that answers may still swallow what it is asked. Of a peer that has served us, or has passed an audit,
an answer is waited for as long as it may take. While one that has not keeps silent, the session is opened on
another route beside, and on more of them the longer it takes; whichever opens first is used, and the others
are ended. Only routes on which a peer of some standing failed are failures to whoever asked: those of
strangers are followed by others at once.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection
from typing import Final, Protocol

import trio

from p2pinfer.errors import NoRoute, PeerError, PeerRefused
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.recent import Recent
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.route import Route
from p2pinfer.session.session import Session

from .route_planner import SessionPlan

FIRST_HEDGE_S: Final = 1.5  # for a stranger to open a session, before another route is tried beside
ROUND_TRIPS: Final = 12  # that it is given if that is longer: hops may be far from each other, too
LEAST_HEDGE_S: Final = 0.1
MOST_AT_ONCE: Final = 16
MAX_REMEMBERED: Final = 1024


class SessionPlanner(Protocol):
    """Source of routes. `ReachableRoutes` is one."""

    async def plan_session(self, tokens: int, excluded: frozenset[str]) -> SessionPlan:
        """A route without the `excluded` peers; NoRoute if there is none."""
        ...

    def hop_failed(self, route: Route, error: PeerError) -> None:
        """Hear that a hop of `route` failed or refused."""
        ...

    def round_trip_s(self, route: Route) -> float:
        """Round trip to the farthest hop of a route, as far as it is known."""
        ...


class OpeningRace:
    """Opens the sessions of one client. `ledger` tells peers of some standing from strangers."""

    def __init__(self, planner: SessionPlanner, ledger: Ledger) -> None:
        self._planner = planner
        self._ledger = ledger
        self._served = Recent[str, None](MAX_REMEMBERED)

    async def open(
        self, tokens: int, excluded: frozenset[str], open_on: Callable[[SessionPlan], Awaitable[Session]]
    ) -> Session:
        """A session for `tokens` positions without the `excluded` peers, opened by `open_on`.

        Raises:
            NoRoute: There is no route.
            PeerError: A peer of some standing failed or refused, or all strangers did.
        """
        return await _Race(self._planner, tokens, excluded, open_on, self._is_known).run(self._note_served)

    def _is_known(self, peer_id: str) -> bool:
        return peer_id in self._served or not self._ledger.score(peer_id).is_stranger

    def _note_served(self, route: Route) -> None:
        for peer_id in route.peer_ids:
            self._served[peer_id] = None


class _Race:
    def __init__(
        self,
        planner: SessionPlanner,
        tokens: int,
        excluded: frozenset[str],
        open_on: Callable[[SessionPlan], Awaitable[Session]],
        is_known: Callable[[str], bool],
    ) -> None:
        self._planner = planner
        self._tokens = tokens
        self._excluded = set(excluded)
        self._open_on = open_on
        self._is_known = is_known
        self._running: list[SessionPlan] = []
        self._failures: list[PeerError] = []
        self._opened: tuple[SessionPlan, Session] | None = None
        self._ends = False  # a peer of some standing failed
        self._news = Pulse()

    async def run(self, note_served: Callable[[Route], None]) -> Session:
        hedge_s = first_s = FIRST_HEDGE_S
        async with open_nursery() as nursery:
            while self._opened is None and not (self._ends and not self._running):
                news = self._news.next
                if not self._ends and len(self._running) < MOST_AT_ONCE:
                    plan = await self._plan()
                    if plan is not None and self._opened is None:
                        self._running.append(plan)
                        first_s = max(first_s, ROUND_TRIPS * self._planner.round_trip_s(plan.route))
                        hedge_s = max(hedge_s, first_s) if len(self._running) == 1 else hedge_s
                        nursery.start_soon(self._attempt, plan)
                    elif plan is None and not self._running:
                        break
                    if plan is None:
                        hedge_s = math.inf
                with trio.move_on_after(hedge_s if self._waits_for_strangers() else math.inf) as patience:
                    await news.wait()
                hedge_s = max(hedge_s / 2, LEAST_HEDGE_S) if patience.cancelled_caught else first_s
        if self._opened is None:
            raise _best(self._failures)
        plan, session = self._opened
        note_served(plan.route)
        return session

    async def _plan(self) -> SessionPlan | None:
        """Another route; None if there is none beside those that run, or after those that failed.

        Raises:
            NoRoute: There is none at all.
        """
        beside = {peer for plan in self._running for peer in self._strangers(plan.route.peer_ids)}
        try:
            return await self._planner.plan_session(self._tokens, frozenset(self._excluded | beside))
        except NoRoute:
            if not self._running and not self._failures and self._opened is None:
                raise
            return None

    async def _attempt(self, plan: SessionPlan) -> None:
        try:
            session = await self._open_on(plan)
            if self._opened is None:
                self._opened = plan, session
            else:
                await session.aclose()
        except PeerError as exc:
            self._failures.append(exc)
            self._planner.hop_failed(plan.route, exc)
            if exc.peer_id and not self._is_known(exc.peer_id):
                self._excluded.add(exc.peer_id)
            else:
                self._ends = True
        finally:
            self._running.remove(plan)
            self._news.fire()

    def _waits_for_strangers(self) -> bool:
        return any(self._strangers(plan.route.peer_ids) for plan in self._running)

    def _strangers(self, peer_ids: Collection[str]) -> list[str]:
        return [peer_id for peer_id in peer_ids if not self._is_known(peer_id)]


def _best(failures: list[PeerError]) -> PeerError:
    """The failure that helps most: a refusal that names what would fit, else the last one."""
    fitting = [each for each in failures if isinstance(each, PeerRefused) and each.fits]
    return max(fitting, key=lambda each: each.fits) if fitting else failures[-1]
