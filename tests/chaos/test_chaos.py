"""A short chaos run, and that a seed plans the same faults every time."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pinfer.node.transport.identity import new_identity

from .chaos import CLIENTS, SPANS, SURVIVORS, run_chaos
from .crowd.victims import open_victims
from .drain import run_drain
from .endurance import grown_mib
from .endurance import shortcomings as shortcomings_of_endurance
from .fuzz import run_fuzz
from .matrix import (
    BEGIN,
    END,
    FAULTS,
    MOMENTS,
    PROMISED_S,
    SEED,
    VICTIMS,
    Case,
    Run,
    cases,
    run_matrix,
    shortcomings,
    write,
)
from .mutate import conversations, mutate
from .processes import CrowdProcess, Zygote
from .schedule import (
    ENDING,
    GAP_S,
    HARMS,
    KINDS,
    MOST_AT_ONCE,
    RECOVERY_S,
    Fault,
    Kind,
    plan_faults,
    whose_fault,
)
from .soak import run_soak


def plan(seed: int, duration_s: float = 600.0, kinds: Sequence[Kind] = KINDS) -> list[Fault]:
    return plan_faults(seed, duration_s, nodes=len(SPANS), clients=CLIENTS, survivors=SURVIVORS, kinds=kinds)


def test_every_block_is_held_by_survivors_and_three_times_over() -> None:
    for block in range(8):
        assert sum(start <= block < stop for start, stop in SPANS) >= 3
        assert any(SPANS[index][0] <= block < SPANS[index][1] for index in SURVIVORS)


@given(st.integers(0, 1 << 32))
@example(149)  # a fault of 299.9997 s
def test_a_seed_always_plans_the_same_faults(seed: int) -> None:
    faults = plan(seed)
    assert faults == plan(seed)
    assert plan(seed, 300.0) == [fault for fault in faults if fault.at_s < 300.0]
    assert all(later.at_s - sooner.at_s >= GAP_S[0] - 0.001 for sooner, later in pairwise(faults))


@given(st.integers(0, 1 << 32))
def test_survivors_are_never_ended_and_nobody_is_harmed_twice_at_once(seed: int) -> None:
    faults = plan(seed)
    assert all(fault.target not in SURVIVORS for fault in faults if fault.kind in ENDING)
    for fault in faults:
        others = [
            each
            for each in faults
            if each is not fault
            and whose_fault(each.kind) == whose_fault(fault.kind)
            and each.at_s <= fault.at_s < each.at_s + each.lasts_s + RECOVERY_S - 0.01
        ]
        assert fault.target not in {each.target for each in others}
        assert whose_fault(fault.kind) != "node" or len(others) < MOST_AT_ONCE
        assert whose_fault(fault.kind) != "crowd" or not others


def test_all_kinds_of_faults_happen() -> None:
    assert {fault.kind for fault in plan(1)} == set(KINDS)


@pytest.mark.slow
def test_whatever_was_promised_arrives(tmp_path: Path) -> None:
    """In 13 seconds this seed plans a fault of each kind."""
    assert {fault.kind for fault in plan(1980, 13.0, HARMS)} == set(HARMS)
    outcome = run_chaos(1980, 13.0, tmp_path, kinds=HARMS, waits=True)
    assert outcome.failures == [], outcome.report()
    assert outcome.generations > 0
    assert set(outcome.faults) == set(HARMS)


def test_memory_that_grows_ends_a_long_run_and_what_is_flat_does_not() -> None:
    flat = [300.0, *(380.0 + index % 7 for index in range(99))]
    leak = [300.0 + 2 * index for index in range(100)]
    assert grown_mib(flat) < 8
    assert shortcomings_of_endurance({"a": flat}, {0: 50, 1: 48}, []) == []
    assert shortcomings_of_endurance({"a": flat, "b": leak}, {0: 50, 1: 48}, []) == ["b has grown by 50 MiB"]
    assert len(shortcomings_of_endurance({"a": flat}, {0: 50, 1: 48, 2: 5}, ["a text"])) == 2


def test_connections_at_victims_are_counted_by_address_and_by_range() -> None:
    """Listeners that are really there, so that who is dialled shows."""
    with open_victims() as victims:
        for address in victims.addrs[:3]:  # two ports of one host, one of the next
            _, _, ip, _, port = address.split("/")
            with socket.create_connection((ip, int(port))):
                pass
        deadline = time.monotonic() + 60
        while len(victims.knocks) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert victims.busiest(10.0) == 0.2
    assert victims.busiest_range(10.0) == 0.3
    assert victims.busiest(10.0, lambda _: "all") == 0.3


@pytest.mark.slow
def test_many_sessions_leave_nothing_behind(tmp_path: Path) -> None:
    outcome = run_soak(100, 24, 0, tmp_path, warm_up=100)
    assert outcome.failures == [], outcome.report()


@pytest.mark.slow
def test_an_honest_client_is_served_while_all_protocols_are_fed_nonsense(tmp_path: Path) -> None:
    """How much it is slowed is for a longer run to say: here it only must not come to a halt."""
    soon = ("--set", "serve.handshake_timeout_s=2", "--set", "host.handshake_timeout_s=2")
    # A node slows down who sends it so much, which has tests of its own.
    unslowed = ("--set", "host.loop_share=1")
    outcome = run_fuzz(200, 200.0, 3, tmp_path, most_slowed=100.0, warm_up=100, flags=(*soon, *unslowed))
    assert outcome.failures == [], outcome.report()
    assert len(outcome.frames) >= 10
    assert outcome.after.connections == 1  # the honest client's: what is held was really counted


@given(st.integers(0, 2**32))
def test_what_is_mutated_is_never_what_it_was(seed: int) -> None:
    rng = random.Random(seed)
    attacker = new_identity()
    talks = conversations("ab" * 16, 320, 8, attacker.peer_id, "/ip4/127.0.0.1/tcp/9", attacker)
    assert all(talk.frames for talk in talks) and len(talks) > 5
    for talk in talks:
        for frame in talk.frames:
            assert mutate(frame, rng) != frame.encode()


@pytest.mark.slow
def test_a_node_with_eight_sessions_leaves_unnoticed(tmp_path: Path) -> None:
    """How long a token may take is for a quiet machine to say: `make drain`."""
    outcome = run_drain(tmp_path, most_stalled_s=60.0, most_exit_s=60.0)
    assert outcome.failures == [], outcome.report()
    assert outcome.failovers == 0


@pytest.mark.slow
def test_a_hop_that_dies_or_freezes_changes_no_token() -> None:
    chosen = [
        Case("kill -9", "at prefill", "first hop", SEED),
        Case("kill -9", "between steps", "two hops"),
        Case("kill -9", "inside a step", "a hop and its replacement", SEED),
        Case("SIGSTOP", "between steps", "last hop"),
        Case("SIGSTOP", "inside a step", "last hop"),
    ]
    runs = run_matrix(("kill -9", "SIGSTOP"), 1, chosen=chosen)
    assert [run.why for run in runs] == [""] * 5, runs
    assert all(run.failovers >= 1 for run in runs)
    # A silent hop is given up after seconds, so a shorter pause would be one that was not measured.
    assert all(run.stall_s > 1 for run in runs if run.case.fault == "SIGSTOP"), runs


def test_every_fault_comes_at_every_moment_to_every_hop(tmp_path: Path) -> None:
    every = list(cases(FAULTS, 2))
    assert len(every) == 2 * len(FAULTS) * len(MOMENTS) * len(VICTIMS) == 180
    assert {(case.fault, case.seed) for case in every} == {
        (fault, seed) for fault in FAULTS for seed in (None, SEED)
    }
    document = tmp_path / "document.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    runs = [Run(case, float(index), 1, "wrong" * (index == 4)) for index, case in enumerate(every)]
    write(document, runs)
    text = document.read_text()
    assert "old" not in text
    assert "| kill -9 | first hop | 45.00 (90.00) | 46.00 (91.00) | 47.00 (92.00) |" in text
    assert "| kill -9 | middle hop | 48.00 (93.00) | 94.00; 1 failed | 50.00 (95.00) |" in text
    assert "180 generations, 179 of them with the ids that transformers gives." in text
    assert len(shortcomings(runs)) == 1 + len(PROMISED_S)
    document.write_text("no marks")
    with pytest.raises(ValueError, match="lacks"):
        write(document, runs)


def test_nobody_gets_a_signal_in_the_place_of_one_that_has_ended(tmp_path: Path) -> None:
    """Numbers of processes come round again within an hour of restarts."""
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    zygote = Sleepers([each.pid for each in sleepers])
    first, second = (CrowdProcess(cast(Zygote, zygote), tmp_path) for _ in sleepers)
    for process in (first, second):
        process.start()
    sleepers[0].kill()
    sleepers[0].wait()
    first.pid = second.pid  # as the kernel may have it
    first.signal(signal.SIGKILL)  # nobody has told yet that it ended
    assert sleepers[1].poll() is None
    second.signal(signal.SIGKILL)
    assert sleepers[1].wait(10) == -signal.SIGKILL
    zygote.exits[1] = -signal.SIGKILL
    assert (first.exit_code, second.exit_code) == (-signal.SIGKILL, None)


class Sleepers:
    """A zygote that has these processes."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.exits: dict[int, int] = {}
        self._pids = iter(enumerate(pids, 1))

    def start(self, *_: object) -> tuple[int, int]:
        return next(self._pids)
