"""Routes among many peers that were invented, or are slow to answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pinfer.errors import NoRoute
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.span import BlockSpan
from p2pinfer.planning.policy_runner import PolicyRunner
from p2pinfer.planning.reachable_routes import ReachableRoutes
from p2pinfer.planning.route_planner import RoutePlanner
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.policy import RiskAdjusted
from p2pinfer.routing.route import Hop
from p2pinfer.session.failover import Gap

from ..node.memory_swarm import MemorySwarm, open_memory_swarm

NOBODY: frozenset[str] = frozenset()


def routes_of(swarm: MemorySwarm) -> ReachableRoutes:
    desk = PolicyRunner(RiskAdjusted(), RiskAdjusted(), timeout_s=5.0)
    member = swarm.member("client")
    planner = RoutePlanner(member, swarm.spec, Ledger(), desk, busy_pause_s=2.0)
    return ReachableRoutes(planner, member, swarm.spec)


def there(swarm: MemorySwarm, peer_id: str, start: int = 0, stop: int = 8, *, after_s: float = 0.0) -> None:
    """A peer that answers after a while, and claims little."""
    swarm.network.host(peer_id)
    swarm.announce(peer_id, start, stop, tokens_per_s=1.0)
    swarm.network.swallowing[peer_id] = after_s


def invent(
    swarm: MemorySwarm, count: int, start: int = 0, stop: int = 8, *, silent: bool, name: str = "x"
) -> None:
    """Peers that claim much and refuse connections, or swallow them."""
    for number in range(count):
        swarm.announce(f"{name}{number}", start, stop, tokens_per_s=1e6, free_cache_tokens=1 << 20)
        if silent:
            swarm.network.swallowing[f"{name}{number}"] = math.inf


@pytest.mark.parametrize(
    ("count", "within_s", "silent"),
    [
        pytest.param(40, 4.0, False, id="40 refusing"),
        pytest.param(40, 4.0, True, id="40 silent"),
        pytest.param(300, 8.0, False, id="300 refusing", marks=pytest.mark.slow),
        pytest.param(1000, 20.0, True, id="1000 silent", marks=pytest.mark.sweep),
    ],
)
async def test_a_real_route_is_found_among_invented_peers(
    count: int, within_s: float, silent: bool, tiny_stories: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Also where the real peer was told of last, by the same neighbour, and looks worse than all others."""
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories"), limit_s=math.inf) as swarm:
        invent(swarm, count, silent=silent)
        there(swarm, "real")
        began_at = trio.current_time()
        plan = await routes_of(swarm).plan_session(64, NOBODY)
        assert plan.route.peer_ids == ("real",)
        assert trio.current_time() - began_at < within_s
        assert len(swarm.network.dialled) <= count + 1, "nobody is tried twice"


async def test_each_part_of_a_route_is_found(
    tiny_stories: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories"), limit_s=math.inf) as swarm:
        invent(swarm, 20, 0, 4, silent=True, name="x")
        invent(swarm, 20, 4, 8, silent=False, name="y")
        invent(swarm, 20, 0, 8, silent=True, name="z")
        there(swarm, "a", 0, 5)
        there(swarm, "b", 4, 8)
        plan = await routes_of(swarm).plan_session(64, NOBODY)
        assert plan.route.peer_ids == ("a", "b")


@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.sweep)])
async def test_those_that_failed_are_better_than_a_minute_among_strangers(
    count: int, tiny_stories: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that slept loses all connections, blames honest peers, and has a table of invented ones."""
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories"), limit_s=math.inf) as swarm:
        invent(swarm, count, silent=True)
        there(swarm, "failed")
        routes, began_at = routes_of(swarm), trio.current_time()
        with pytest.raises(NoRoute):
            await routes.plan_session(64, frozenset({"failed"}))
        gave_up_s = trio.current_time() - began_at
        assert gave_up_s < 15.0
        plan = await routes.plan_session(64, NOBODY)
        assert plan.route.peer_ids == ("failed",)


async def test_what_another_neighbour_told_of_is_tried_among_the_first(
    tiny_stories: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories"), limit_s=math.inf) as swarm:
        invent(swarm, 200, silent=True)
        swarm.network.host("real")
        swarm.network.swallowing["real"] = 0.0
        swarm.announce("real", tokens_per_s=1.0, told_by="another")
        began_at = trio.current_time()
        plan = await routes_of(swarm).plan_session(64, NOBODY)
        assert plan.route.peer_ids == ("real",)
        assert trio.current_time() - began_at < 2.0


async def test_a_peer_that_is_slow_to_answer_is_waited_for_if_there_is_nobody_else(
    tiny_stories: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A satellite in between, say."""
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories"), limit_s=math.inf) as swarm:
        there(swarm, "far", after_s=8.0)
        invent(swarm, 5, silent=False)
        plan = await routes_of(swarm).plan_session(64, NOBODY)
        assert plan.route.peer_ids == ("far",)


@pytest.mark.parametrize(("far", "chosen"), [("relay", "home"), ("home", "home"), ("another", "near")])
async def test_far_peers_have_the_time_of_a_connection_s_round_trips(
    far: str, chosen: str, tiny_stories: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Through a relay that is 100 ms away a connection takes a second; it has it, whoever else is near."""
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories"), limit_s=math.inf) as swarm:
        there(swarm, "home", after_s=1.2)
        swarm.announce(
            "home", tokens_per_s=1e3, addrs=("/ip4/11.0.1.1/tcp/4001/p2p/relay/p2p-circuit/p2p/home",)
        )
        swarm.network.host("near")
        swarm.announce("near", tokens_per_s=1.0)
        routes = routes_of(swarm)
        swarm.network.hosts["client"].round_trips.note(far, 0.1)
        plan = await routes.plan_session(64, NOBODY)
        assert plan.route.peer_ids == (chosen,)


async def test_where_nobody_answers_there_is_no_route_and_the_reason_is_said(
    tiny_stories: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories"), limit_s=math.inf) as swarm:
        invent(swarm, 12, silent=False)
        with pytest.raises(NoRoute, match=r"the last peer that was tried: peer x\d+ cannot be reached"):
            await routes_of(swarm).plan_session(64, NOBODY)


async def test_connected_peers_are_asked_without_a_dial(tiny_stories: Path) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        swarm.network.host("real")
        swarm.announce("real")
        plan = await routes_of(swarm).plan_session(64, NOBODY)
        assert plan.route.peer_ids == ("real",)
        assert swarm.network.dialled == []


async def test_a_replacement_answers_too(tiny_stories: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories"), limit_s=math.inf) as swarm:
        swarm.network.host("before")
        swarm.announce("before", 0, 3)
        invent(swarm, 30, 3, 8, silent=True)
        there(swarm, "spare", 3, 8)
        gap = Gap(BlockSpan(3, 8), 64, frozenset({"before"}), Hop("before", BlockSpan(0, 3)), None, "float32")
        began_at = trio.current_time()
        assert (await routes_of(swarm).find_replacement(gap)).peer_ids == ("spare",)
        assert trio.current_time() - began_at < 4.0
