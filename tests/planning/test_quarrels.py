"""One neighbour's word against the other's costs both alike, and in the end whoever always complains."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation, WrongOutput
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.span import BlockSpan
from p2pinfer.planning.policy_runner import PolicyRunner
from p2pinfer.planning.quarrels import CHARGED_S, EDGE_S, Quarrels
from p2pinfer.planning.route_planner import RoutePlanner
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.config import RoutingConfig
from p2pinfer.routing.policy import RiskAdjusted
from p2pinfer.routing.route import Hop, Route, RouteOutcome

from ..node.memory_swarm import MemorySwarm, open_memory_swarm


def note(quarrels: Quarrels, accuser: str, accused: str, now: float) -> dict[str, float]:
    """With everybody in good standing but the crowd."""
    return dict(quarrels.note(accuser, accused, now, lambda peer_id: not peer_id.startswith("crowd")))


def test_both_are_charged_alike_and_a_pair_once_in_a_while() -> None:
    quarrels = Quarrels()
    assert note(quarrels, "a", "b", 0.0) == {"a": 0.5, "b": 0.5}
    assert note(quarrels, "a", "b", 1.0) == {}
    assert note(quarrels, "b", "a", 2.0) == {}  # whoever of the two complains
    assert note(quarrels, "a", "b", CHARGED_S + 1) == {"a": 0.5, "b": 0.5}


def test_who_complains_of_one_after_the_other_is_charged_alone() -> None:
    quarrels = Quarrels()
    assert note(quarrels, "liar", "a", 0.0) == {"liar": 0.5, "a": 0.5}
    assert note(quarrels, "liar", "b", 1.0) == {"liar": 0.5, "b": 0.5}
    assert note(quarrels, "liar", "a", 2.0) == note(quarrels, "liar", "b", 3.0) == {"liar": 1.0}
    assert note(quarrels, "liar", "a", 2 * CHARGED_S) == {"liar": 0.5, "a": 0.5}


def test_of_whom_one_after_the_other_complains_is_charged_alone() -> None:
    quarrels = Quarrels()
    note(quarrels, "a", "broken", 0.0)
    note(quarrels, "b", "broken", 1.0)
    assert note(quarrels, "a", "broken", 2.0) == {"broken": 1.0}


def test_a_crowd_of_newcomers_cannot_drag_one_peer_down() -> None:
    """Keys cost nothing."""
    quarrels = Quarrels()
    for number in range(3):
        note(quarrels, f"crowd{number}", "honest", 0.0)
    assert all("honest" not in note(quarrels, f"crowd{n % 3}", "honest", float(n)) for n in range(30))


def test_neighbours_that_give_reason_to_complain_do_not_drag_one_peer_down() -> None:
    """Keys that send garbage to a hop make it complain of one after the other."""
    quarrels = Quarrels()
    for number in range(3):
        assert note(quarrels, "honest", f"crowd{number}", 0.0) == {"honest": 0.5, f"crowd{number}": 0.5}
    assert all(not note(quarrels, "honest", f"crowd{n % 3}", float(n)) for n in range(30))
    for number in range(2):  # where nobody is in good standing, that says who is the common part of the edges
        note(quarrels, "crowd9", f"crowd{number}", 0.0)
    assert note(quarrels, "crowd9", "crowd0", 1.0) == {"crowd9": 1.0}


def test_two_in_good_standing_charge_a_third_alone_once_each() -> None:
    """Its repetition is free for the two, and would take the reliability of anybody they like."""
    quarrels = Quarrels()
    note(quarrels, "a", "honest", 0.0)
    note(quarrels, "b", "honest", 0.0)
    charged = [note(quarrels, "ab"[number % 2], "honest", float(number)) for number in range(40)]
    assert sum(each.get("honest", 0.0) for each in charged) == 2.0
    assert note(quarrels, "a", "honest", CHARGED_S - 1) == {}


def test_the_edge_is_avoided_for_a_while() -> None:
    quarrels = Quarrels()
    note(quarrels, "a", "b", 0.0)
    assert set(quarrels.edges(1.0)) == {("a", "b")}
    assert quarrels.edges(EDGE_S) == {}


def planner_of(swarm: MemorySwarm, ledger: Ledger) -> RoutePlanner:
    policy = RiskAdjusted(RoutingConfig(explore_share=0.0, probation_share=0.0))
    runner = PolicyRunner(policy, policy, timeout_s=5.0)
    return RoutePlanner(swarm.member("client"), swarm.spec, ledger, runner, busy_pause_s=2.0)


def route_over(before: str) -> Route:
    spans = {before: (0, 3), "liar": (3, 5), "last": (5, 8)}
    return Route(tuple(Hop(peer_id, BlockSpan(*span)) for peer_id, span in spans.items()))


@pytest.mark.parametrize("at_opening", [True, False])
async def test_a_hop_that_blames_its_predecessors_falls_below_them(
    at_opening: bool, tiny_stories: Path
) -> None:
    """Sixteen such sessions took two honest peers to 0.16 and 0.13, and left the accuser at 0.98."""
    ledger = Ledger()
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        planner = planner_of(swarm, ledger)
        for number in range(32):
            accused = f"honest{number % 2}"
            if at_opening:
                planner.hop_failed(route_over(accused), PeerVanished("lost", accused, told_by="liar"))
            else:
                outcome = RouteOutcome(ok=False, error="not finite", failed_peer=accused, told_by="liar")
                planner.route_ended(route_over(accused), outcome)
    for honest in ("honest0", "honest1"):
        assert ledger.score(honest).reliability == pytest.approx(0.95 * 10 / 10.5)
        assert ledger.account(honest).failures == 1
    assert ledger.score("liar").reliability < 0.3
    assert ledger.score("last").reliability == pytest.approx(0.95)


async def test_routes_keep_apart_who_quarrelled_and_use_both(tiny_stories: Path) -> None:
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        planner = planner_of(swarm, Ledger())
        swarm.announce("a", 0, 3, tokens_per_s=500)
        swarm.announce("b", 3, 8, tokens_per_s=500)
        swarm.announce("a2", 0, 3, tokens_per_s=50)
        assert (await planner.plan_session(64, frozenset())).route.peer_ids == ("a", "b")
        planner.hop_failed(Route(()), WrongOutput("not finite", "a", told_by="b"))
        assert (await planner.plan_session(64, frozenset())).route.peer_ids == ("a2", "b")
        # Where nobody else is, they are used together after all.
        assert (await planner.plan_session(64, frozenset({"a2"}))).route.peer_ids == ("a", "b")


async def test_what_is_found_when_a_session_is_over_is_charged_as_while_it_ran(tiny_stories: Path) -> None:
    """A receipt that two neighbours may have broken would else be the fault of the first of them."""
    ledger = Ledger()
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        planner = planner_of(swarm, ledger)
        for _ in range(5):
            planner.blame(ProtocolViolation("a broken receipt", "honest", told_by="liar"))
        planner.blame(ProtocolViolation("a receipt of another model", "sloppy"))
    assert ledger.score("honest").reliability == ledger.score("liar").reliability == pytest.approx(9.5 / 10.5)
    assert ledger.score("sloppy").reliability == pytest.approx(9.5 / 11)


async def test_what_this_process_saw_itself_is_the_peers_fault_alone(tiny_stories: Path) -> None:
    ledger = Ledger()
    async with open_memory_swarm(open_checkpoint(tiny_stories, "tiny-stories")) as swarm:
        planner = planner_of(swarm, ledger)
        planner.hop_failed(route_over("a"), PeerVanished("it shows no sign of life", "a"))
        await trio.lowlevel.checkpoint()
    assert ledger.account("a").failures == 1 and not ledger.account("liar").failures
