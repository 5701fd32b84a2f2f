"""Which of several routes a session is opened on, where peers swallow what they are asked."""

from __future__ import annotations

from typing import cast

import pytest
import trio
import trio.testing

from p2pinfer.errors import NoRoute, PeerError, PeerRefused, PeerUnreachable
from p2pinfer.models.span import BlockSpan
from p2pinfer.planning.opening_race import OpeningRace
from p2pinfer.planning.route_planner import SessionPlan
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.session import Session


class Swarm:
    """Peers that hold all blocks, asked in their order. By peer: what it does, or after how long it opens."""

    def __init__(self, **peers: float | PeerError) -> None:
        self.peers = peers
        self.asked: list[str] = []
        self.failed: list[str] = []
        self.ended: list[str] = []
        self.ledger = Ledger()
        self.rtt_s = 0.0
        self.race = OpeningRace(self, self.ledger)

    async def plan_session(self, tokens: int, excluded: frozenset[str]) -> SessionPlan:
        await trio.lowlevel.checkpoint()
        for peer_id in self.peers:
            if peer_id not in excluded:
                return SessionPlan(Route((Hop(peer_id, BlockSpan(0, 8)),)), "float32")
        raise NoRoute("no route")

    def hop_failed(self, route: Route, error: PeerError) -> None:
        self.failed.append(error.peer_id)

    def round_trip_s(self, route: Route) -> float:
        return self.rtt_s

    async def open_on(self, plan: SessionPlan) -> Session:
        (peer_id,) = plan.route.peer_ids
        self.asked.append(peer_id)
        does = self.peers[peer_id]
        if isinstance(does, PeerError):
            await trio.lowlevel.checkpoint()
            raise does
        await trio.sleep(does)
        return cast(Session, Opened(peer_id, self.ended))

    async def open(self, *excluded: str) -> str:
        return cast(Opened, await self.race.open(64, frozenset(excluded), self.open_on)).peer_id


class Opened:
    def __init__(self, peer_id: str, ended: list[str]) -> None:
        self.peer_id = peer_id
        self._ended = ended

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._ended.append(self.peer_id)


def gone(peer_id: str) -> PeerUnreachable:
    return PeerUnreachable("gone", peer_id)


async def test_a_peer_that_opens_is_the_only_one_asked(autojump_clock: trio.testing.MockClock) -> None:
    swarm = Swarm(a=1.0, b=0.0)
    assert await swarm.open() == "a"
    assert swarm.asked == ["a"]


async def test_beside_a_stranger_that_swallows_the_opening_others_are_asked(
    autojump_clock: trio.testing.MockClock,
) -> None:
    swarm = Swarm(**{f"x{n}": 1e9 for n in range(10)}, real=0.2, other=0.2)
    began_at = trio.current_time()
    assert await swarm.open() == "real"
    assert trio.current_time() - began_at < 5.0
    assert swarm.failed == []


async def test_failures_of_strangers_are_followed_by_others_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    swarm = Swarm(**{f"x{n}": gone(f"x{n}") for n in range(40)}, real=0.0)
    began_at = trio.current_time()
    assert await swarm.open() == "real"
    assert trio.current_time() == began_at
    assert len(swarm.failed) == 40


async def test_a_peer_that_has_served_us_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    swarm = Swarm(a=1.0, b=0.0)
    await swarm.open()
    swarm.peers["a"] = 10.0
    assert await swarm.open() == "a"
    assert swarm.asked == ["a", "a"]


async def test_the_failure_of_a_known_peer_is_the_askers(autojump_clock: trio.testing.MockClock) -> None:
    swarm = Swarm(a=0.0, b=0.0)
    await swarm.open()
    swarm.peers["a"] = gone("a")
    with pytest.raises(PeerUnreachable, match="gone"):
        await swarm.open()
    assert swarm.asked == ["a", "a"]
    assert await swarm.open("a") == "b"


async def test_a_slow_stranger_still_wins_if_it_is_first(autojump_clock: trio.testing.MockClock) -> None:
    swarm = Swarm(a=3.0, b=10.0)
    assert await swarm.open() == "a"
    assert swarm.asked == ["a", "b"]


async def test_a_far_stranger_is_given_its_round_trips(autojump_clock: trio.testing.MockClock) -> None:
    swarm = Swarm(far=7.0, other=0.0)
    swarm.rtt_s = 1.6
    assert await swarm.open() == "far"
    assert swarm.asked == ["far"]


async def test_of_many_refusals_the_one_that_names_what_fits_is_told(
    autojump_clock: trio.testing.MockClock,
) -> None:
    full = PeerRefused("full", "a", "cache_full", fits=100)
    swarm = Swarm(a=full, b=PeerRefused("busy", "b", "busy"), c=gone("c"))
    with pytest.raises(PeerRefused) as refused:
        await swarm.open()
    assert refused.value is full
    with pytest.raises(NoRoute):
        await swarm.open("a", "b", "c")
