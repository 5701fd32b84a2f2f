"""benchmarks/reputation_sim.py in small: the ledger, the policy and the planner against malicious peers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

SMALL = {"peers_count": 32, "clients_count": 6}


@pytest.fixture(scope="module")
def sim() -> Iterator[Any]:
    """The script, loaded from its folder: scripts are no package, and the tests may run on a wheel."""
    folder = Path(__file__).parents[2] / "benchmarks"
    if not (folder / "reputation_sim.py").exists():
        pytest.skip("benchmarks/ is not here")
    sys.path.insert(0, str(folder))
    try:
        yield import_module("reputation_sim")
    finally:
        sys.path.remove(str(folder))
        for name in ("reputation_sim", "reputation_world"):
            sys.modules.pop(name, None)
        logging.disable(logging.NOTSET)


def test_what_is_learnt_helps_and_what_is_shared_helps_more(sim: Any) -> None:
    """40 % of the peers lie in a fifth of their sessions."""
    none, own, shared = (sim.simulate("fifth", 0.4, each, 1, 30, **SMALL) for each in ("none", "own", "all"))
    assert none.overall > 0.2 and none.audit_cost == 0
    assert shared.overall < own.overall < none.overall
    assert shared.last < none.last / 2
    assert own.last < none.last  # alone, a client's budget is soon used up where all are new and many lie
    assert shared.spoilt < none.spoilt / 3
    assert shared.honest_bans == own.honest_bans == 0
    assert 0 < shared.audit_cost < 0.03 and 0 < shared.late_audit_cost < 0.03


@pytest.mark.parametrize("attack", ["exit-scam", "collude", "whitewash", "bad-mouth"])
def test_no_attack_gets_honest_peers_banned_or_more_through_than_without_reputation(
    sim: Any, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scam = sim.Attack(honest_first=5)  # the long run's peers serve a hundred sessions first
    monkeypatch.setitem(sim.ATTACKS, "exit-scam", scam)
    none, shared = (sim.simulate(attack, 0.4, each, 2, 24, **SMALL) for each in ("none", "all"))
    assert none.overall > 0 and shared.overall <= none.overall
    assert shared.honest_bans == 0
    assert shared.slowdown < 1.25


def test_a_run_is_the_same_for_the_same_seed(sim: Any) -> None:
    one, other = (sim.simulate("always", 0.2, "all", 3, 6, **SMALL) for _ in range(2))
    assert one == other != sim.simulate("always", 0.2, "all", 4, 6, **SMALL)
    assert sim.table(sim.averaged([one, other])).count("\n") == 2


def test_an_honest_newcomer_comes_to_its_share(sim: Any) -> None:
    """Of what it has had it been there from the start; eight of 40 peers are new."""
    shares = sim.newcomers(1, 15, 45, 5, **SMALL)
    assert shares[0] < mean(shares[-4:])
    assert mean(shares[-4:]) > 0.7
