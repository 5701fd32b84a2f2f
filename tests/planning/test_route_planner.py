"""Routes by what a client's table says and what its sessions have shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from p2pinfer.errors import NoRoute
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.checkpoint.spec import read_config
from p2pinfer.models.configs.numbers import numbers_of, revision_digest
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.planning.policy_runner import PolicyRunner
from p2pinfer.planning.route_planner import RoutePlanner
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.view import ReputationView
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.coordinates import Coordinate
from p2pinfer.routing.policy import RiskAdjusted, RoutingPolicy
from p2pinfer.routing.route import Candidate, Hop, Route, RouteOutcome, RouteRequest
from p2pinfer.session.failover import Gap

from ..node.memory_swarm import MemorySwarm, open_memory_swarm, route_over

NO_TRIALS = RoutingConfig(explore_share=0.0, probation_share=0.0)  # which would be drawn by chance


async def test_a_hop_is_only_given_up_for_one_that_would_save_half_of_its_time(tiny_stories: Path) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        policy_runner = PolicyRunner(RiskAdjusted(NO_TRIALS), RiskAdjusted(NO_TRIALS), timeout_s=5.0)
        planner = RoutePlanner(swarm.member("client"), swarm.spec, Ledger(), policy_runner, busy_pause_s=2.0)
        await swarm.serve("a", 0, 3, tokens_per_s=100)
        await swarm.serve("b", 3, 8, tokens_per_s=100)
        a, b = Hop("a", BlockSpan(0, 3)), Hop("b", BlockSpan(3, 8))
        gap = Gap(b.span, 64, frozenset({"a", "b"}), a, None, "float32")
        with pytest.raises(NoRoute):
            await planner.find_faster(replace(gap, tokens=1 << 30), b, 5.0)
        assert await planner.find_faster(gap, b, 5.0) is None  # there is nobody else
        await swarm.serve("c", 3, 8, tokens_per_s=10)
        assert await planner.find_faster(gap, b, 0.15) is None
        route = await planner.find_faster(gap, b, 1.0)
        assert route is not None
        assert route.peer_ids == ("c",)
        # Sessions have shown that it is not as fast as it says.
        planner.route_ended(route, RouteOutcome(ok=True, per_hop_ms=(900.0,)))
        assert await planner.find_faster(gap, b, 1.0) is None


async def test_who_has_the_weights_but_another_config_is_told_apart_by_the_field(tiny_stories: Path) -> None:
    config = read_config(tiny_stories)
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        policy_runner = PolicyRunner(RiskAdjusted(NO_TRIALS), RiskAdjusted(NO_TRIALS), timeout_s=5.0)
        numbers = numbers_of({**config, "rope_theta": 500_000})
        revision = revision_digest(swarm.spec.weights, numbers)
        ours = replace(swarm.spec, revision=revision, numbers=numbers)
        planner = RoutePlanner(swarm.member("client"), ours, Ledger(), policy_runner, busy_pause_s=2.0)
        with pytest.raises(NoRoute, match=r"would$") as nobody:
            await planner.plan_session(64, frozenset())
        await swarm.serve("theirs", 0, 8)
        with pytest.raises(NoRoute) as told:
            await planner.plan_session(64, frozenset())
    assert str(told.value) == (
        f"{nobody.value}; peers with the same weights compute with another config.json "
        "(theirs: rope_theta is 500000 here and 10000 there); make them agree"
    )
    assert told.value.missing == ((0, 8),)


async def test_who_could_not_be_reached_is_left_out_unless_nobody_else_has_its_blocks(
    tiny_stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        policy_runner = PolicyRunner(RiskAdjusted(NO_TRIALS), RiskAdjusted(NO_TRIALS), timeout_s=5.0)
        member = swarm.member("client")
        planner = RoutePlanner(member, swarm.spec, Ledger(), policy_runner, busy_pause_s=2.0)
        silent = {"fast"}

        def is_silent(announced: Announcement) -> bool:
            return announced.peer_id in silent

        monkeypatch.setattr(member.presence, "is_silent", is_silent)
        await swarm.serve("fast", 0, 8, tokens_per_s=1000)
        await swarm.serve("slow", 0, 8, tokens_per_s=10)
        assert (await planner.plan_session(64, frozenset())).route.peer_ids == ("slow",)
        assert (await planner.plan_session(64, frozenset({"slow"}))).route.peer_ids == ("fast",)
        a = Hop("a", BlockSpan(0, 3))
        gap = Gap(BlockSpan(3, 8), 64, frozenset({"a", "slow"}), a, None, "float32")
        assert (await planner.find_replacement(gap)).peer_ids == ("fast",)
        assert (await planner.find_replacement(replace(gap, excluded=frozenset({"a"})))).peer_ids == ("slow",)
        silent.add("slow")  # it is us who lost the network
        assert (await planner.plan_session(64, frozenset())).route.peer_ids == ("fast",)


class Told(RoutingPolicy):
    """The default policy's choice, or what it is told; notes what every edge was said to carry."""

    stand_in = False

    def __init__(self, *choices: Route) -> None:
        self.sizes: list[int] = []
        self.peers: list[set[str]] = []
        self._choices = list(choices)

    def choose_routes(
        self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
    ) -> Sequence[Route]:
        self.sizes.append(request.hidden_bytes_per_token)
        self.peers.append({each.peer_id for each in candidates})
        if self._choices:
            return [self._choices.pop(0)]
        return RiskAdjusted(NO_TRIALS).choose_routes(candidates, request, view)


def planner_of(swarm: MemorySwarm, policy: RoutingPolicy) -> RoutePlanner:
    policy_runner = PolicyRunner(policy, RiskAdjusted(NO_TRIALS), timeout_s=5.0)
    return RoutePlanner(swarm.member("client"), swarm.spec, Ledger(), policy_runner, busy_pause_s=2.0)


@pytest.mark.parametrize(
    ("dtypes", "sizes", "codec"),
    [
        (("bfloat16", "bfloat16"), [640], "bfloat16"),
        (("float16", "float16"), [640], "float16"),
        (("float32", "float32"), [1280], "float32"),
        (("float32", "bfloat16"), [1280], "float32"),
        (("float16", "bfloat16"), [1280], "float32"),
    ],
)
async def test_an_edge_costs_what_travels_over_it(
    dtypes: tuple[str, str], sizes: list[int], codec: Codec, tiny_stories: Path
) -> None:
    """320 channels, of two bytes or of four."""
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        for peer_id, span, dtype in zip("ab", ((0, 3), (3, 8)), dtypes, strict=True):
            swarm.announce(peer_id, *span, dtype=dtype)
        # None of these can be used, so none of them has a say.
        swarm.announce("full", 0, 8, dtype="float32", free_cache_tokens=0)
        swarm.announce("foreign", 0, 8, dtype="bfloat16_float32")
        swarm.announce("excluded", 0, 8, dtype="float16")
        policy = Told()
        plan = await planner_of(swarm, policy).plan_session(64, frozenset({"excluded"}))
        assert (plan.route.peer_ids, plan.codec, policy.sizes) == (("a", "b"), codec, sizes)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
async def test_a_token_is_expected_to_take_compute_delays_and_bytes(
    dtype: str, width: int, tiny_stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Risks are for the choice of a route: of a token that comes they say nothing."""
    config = RoutingConfig(hop_overhead_s=0.003, bandwidth_bytes_per_s=1e5)
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        # All three are 80 ms apart.
        places = ((0.0, 0.0), (80.0, 0.0), (40.0, 4800**0.5))
        here, a, b = (Coordinate(x, y, 0.0, 0.0, 0.1) for x, y in places)
        swarm.announce("a", 0, 4, dtype=dtype, tokens_per_s=100, coordinate=a)
        swarm.announce("b", 4, 8, dtype=dtype, tokens_per_s=50, coordinate=b)
        policy_runner = PolicyRunner(RiskAdjusted(NO_TRIALS), RiskAdjusted(NO_TRIALS), timeout_s=5.0)
        member = swarm.member("client")
        monkeypatch.setattr(type(member), "coordinate", here)
        planner = RoutePlanner(member, swarm.spec, Ledger(), policy_runner, 2.0, config)
        route = route_over(a=(0, 2), b=(2, 8))
        edges_s = 3 * (0.04 + 320 * width / 1e5)
        part = route_over(a=(0, 4), b=(4, 8))
        assert planner.expected_s(part) == pytest.approx(0.006 + 0.01 + 0.02 + edges_s)
        assert planner.expected_s(route) == pytest.approx(0.006 + 0.01 / 2 + 0.02 * 6 / 4 + edges_s)
        assert planner.expected_s(route_over(a=(0, 4), gone=(4, 8))) is None
        swarm.announce("b", 4, 8, dtype=dtype, tokens_per_s=50, coordinate=b._replace(error=0.9))
        assert planner.expected_s(part) is None, "the line to b was never measured"
        bytes_s = 3 * 320 * width / 1e5
        told = planner.expected_s(part, (0.04, 0.1, 0.06))
        assert told == pytest.approx(0.006 + 0.01 + 0.02 + (0.04 + 0.1 + 0.06) / 2 + bytes_s)
        assert planner.expected_s(part, (0.04, 0.0, 0.06)) is None, "nobody said how far b is from a"


NEAR, FAR = Coordinate(20.0, 0.0, 0.0, 0.0, 0.1), Coordinate(900.0, 0.0, 0.0, 0.0, 0.1)


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        pytest.param({"slow": ((0, 8), 2.0, NEAR)}, ("a", "b"), id="slow blocks"),
        pytest.param({"far": ((0, 8), 1000.0, FAR)}, ("a", "b"), id="far away"),
        pytest.param({"far": ((3, 5), 1000.0, FAR)}, ("a", "b"), id="far away, in the middle"),
        pytest.param({"tiny": ((2, 4), 400.0, NEAR)}, ("a", "b"), id="one hop more"),
        pytest.param({"whole": ((0, 8), 100.0, NEAR)}, ("whole",), id="one hop for all"),
    ],
)
async def test_a_hop_that_would_slow_the_route_is_left_out(
    others: dict[str, tuple[tuple[int, int], float, Coordinate]],
    chosen: tuple[str, ...],
    tiny_stories: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever is far, slow, or one more than it takes; and the route is as fast as was expected of it."""
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        for name, span in (("a", (0, 4)), ("b", (4, 8))):
            swarm.announce(name, *span, tokens_per_s=200.0, coordinate=NEAR)
        for name, (span, tokens_per_s, coordinate) in others.items():
            swarm.announce(name, *span, tokens_per_s=tokens_per_s, coordinate=coordinate)
        member = swarm.member("client")
        monkeypatch.setattr(type(member), "coordinate", NEAR._replace(x_ms=0.0))
        policy = RiskAdjusted(NO_TRIALS)
        planner = RoutePlanner(member, swarm.spec, Ledger(), PolicyRunner(policy, policy, timeout_s=5.0), 2.0)
        route = (await planner.plan_session(64, frozenset())).route
        assert route.peer_ids == chosen
        expected = planner.expected_s(route)
        worse = [
            planner.expected_s(Route(tuple(hops)))
            for hops in ([Hop(name, BlockSpan(*span))] for name, (span, _, _) in others.items())
            if hops[0].span == BlockSpan(0, 8) and hops[0].peer_id not in chosen
        ]
        assert expected is not None and all(each is not None and expected < each for each in worse)


async def test_a_route_of_one_codec_among_peers_of_several_is_chosen_at_its_own_size(
    tiny_stories: Path,
) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        for peer_id, start, stop in (("a", 0, 3), ("b", 3, 8)):
            swarm.announce(peer_id, start, stop, dtype="bfloat16", tokens_per_s=500)
        swarm.announce("slow", 0, 8, dtype="float32", tokens_per_s=1)
        policy = Told()
        plan = await planner_of(swarm, policy).plan_session(64, frozenset())
        assert (plan.route.peer_ids, plan.codec) == (("a", "b"), "bfloat16")
        assert policy.sizes == [1280, 640]
        assert policy.peers == [{"a", "b", "slow"}, {"a", "b"}]


async def test_a_policy_that_changes_its_mind_keeps_its_first_route_and_that_ones_codec(
    tiny_stories: Path,
) -> None:
    class Fickle(Told):
        def choose_routes(
            self, candidates: Sequence[Candidate], request: RouteRequest, view: ReputationView
        ) -> Sequence[Route]:
            if self.sizes:
                raise NoRoute("no more")
            return super().choose_routes(candidates, request, view)

    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        swarm.announce("quick", 0, 8, dtype="float16", tokens_per_s=500)
        swarm.announce("slow", 0, 8, dtype="float32", tokens_per_s=1)
        plan = await planner_of(swarm, Fickle()).plan_session(64, frozenset())
        assert (plan.route.peer_ids, plan.codec) == (("quick",), "float16")


@pytest.mark.parametrize(("codec", "size"), [("bfloat16", 640), ("float16", 640), ("float32", 1280)])
async def test_replacements_are_chosen_at_the_size_of_their_sessions_codec(
    codec: Codec, size: int, tiny_stories: Path
) -> None:
    """Whatever they compute in, and whoever else there is."""
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        swarm.announce("before", 0, 3, dtype="float32")
        swarm.announce("spare", 3, 8, dtype="float32")
        swarm.announce("slow", 3, 8, dtype="bfloat16")
        policy = Told()
        planner = planner_of(swarm, policy)
        before, slow = Hop("before", BlockSpan(0, 3)), Hop("slow", BlockSpan(3, 8))
        gap = Gap(slow.span, 64, frozenset({"before", "slow"}), before, None, codec)
        assert (await planner.find_replacement(gap)).peer_ids == ("spare",)
        assert await planner.find_faster(gap, slow, 30.0) is not None
        assert policy.sizes == [size, size]


async def test_blocks_that_only_unknown_numerics_serve_have_no_route(tiny_stories: Path) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        swarm.announce("foreign", 0, 8, dtype="q4_k_m")
        with pytest.raises(NoRoute, match="only by peers that compute in q4_k_m, which this version"):
            await planner_of(swarm, RiskAdjusted(NO_TRIALS)).plan_session(64, frozenset())
