"""Routes by what a client's table says and what its sessions have shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from p2pinfer.errors import NoRoute
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.checkpoint.numbers import numbers_of, revision_digest
from p2pinfer.models.checkpoint.spec import read_config
from p2pinfer.models.span import BlockSpan
from p2pinfer.planning.policy_runner import PolicyRunner
from p2pinfer.planning.route_planner import RoutePlanner
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.policy import RiskAdjusted
from p2pinfer.routing.route import Hop, RouteOutcome
from p2pinfer.session.failover import Gap

from ..node.memory_swarm import open_memory_swarm


async def test_a_hop_is_only_given_up_for_one_that_would_save_half_of_its_time(tiny_stories: Path) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        desk = PolicyRunner(RiskAdjusted(), RiskAdjusted(), timeout_s=5.0)
        navigator = RoutePlanner(swarm.member("client"), swarm.spec, Ledger(), desk, busy_pause_s=2.0)
        await swarm.serve("a", 0, 3, tokens_per_s=100)
        await swarm.serve("b", 3, 8, tokens_per_s=100)
        a, b = Hop("a", BlockSpan(0, 3)), Hop("b", BlockSpan(3, 8))
        gap = Gap(b.span, 64, frozenset({"a", "b"}), a, None)
        with pytest.raises(NoRoute):
            await navigator.better(replace(gap, tokens=1 << 30), b, 5.0)
        assert await navigator.better(gap, b, 5.0) is None  # there is nobody else
        await swarm.serve("c", 3, 8, tokens_per_s=10)
        assert await navigator.better(gap, b, 0.15) is None
        route = await navigator.better(gap, b, 1.0)
        assert route is not None
        assert route.peer_ids == ("c",)
        # Sessions have shown that it is not as fast as it says.
        navigator.route_ended(route, RouteOutcome(ok=True, per_hop_ms=(900.0,)))
        assert await navigator.better(gap, b, 1.0) is None


async def test_who_has_the_weights_but_another_config_is_told_apart_by_the_field(tiny_stories: Path) -> None:
    config = read_config(tiny_stories)
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        desk = PolicyRunner(RiskAdjusted(), RiskAdjusted(), timeout_s=5.0)
        numbers = numbers_of({**config, "rope_theta": 500_000})
        revision = revision_digest(swarm.spec.weights, numbers)
        ours = replace(swarm.spec, revision=revision, numbers=numbers)
        navigator = RoutePlanner(swarm.member("client"), ours, Ledger(), desk, busy_pause_s=2.0)
        with pytest.raises(NoRoute, match=r"would$") as nobody:
            await navigator.choose_route(64, frozenset())
        await swarm.serve("theirs", 0, 8)
        with pytest.raises(NoRoute) as told:
            await navigator.choose_route(64, frozenset())
    assert str(told.value) == (
        f"{nobody.value}; peers with the same weights compute with another config.json "
        "(theirs: rope_theta is 500000 here and 10000 there); make them agree"
    )
    assert told.value.missing == ((0, 8),)


async def test_who_could_not_be_reached_is_left_out_unless_nobody_else_has_its_blocks(
    tiny_stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        desk = PolicyRunner(RiskAdjusted(), RiskAdjusted(), timeout_s=5.0)
        member = swarm.member("client")
        navigator = RoutePlanner(member, swarm.spec, Ledger(), desk, busy_pause_s=2.0)
        silent = {"fast"}

        def is_silent(announced: Announcement) -> bool:
            return announced.peer_id in silent

        monkeypatch.setattr(member.presence, "is_silent", is_silent)
        await swarm.serve("fast", 0, 8, tokens_per_s=1000)
        await swarm.serve("slow", 0, 8, tokens_per_s=10)
        assert (await navigator.choose_route(64, frozenset())).peer_ids == ("slow",)
        assert (await navigator.choose_route(64, frozenset({"slow"}))).peer_ids == ("fast",)
        a = Hop("a", BlockSpan(0, 3))
        gap = Gap(BlockSpan(3, 8), 64, frozenset({"a", "slow"}), a, None)
        assert (await navigator.replacement(gap)).peer_ids == ("fast",)
        assert (await navigator.replacement(replace(gap, excluded=frozenset({"a"})))).peer_ids == ("slow",)
        silent.add("slow")  # it is us who lost the network
        assert (await navigator.choose_route(64, frozenset())).peer_ids == ("fast",)
