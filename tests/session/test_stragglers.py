"""Which hop is slow, and how often that is a reason to look around."""

from __future__ import annotations

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.messages import Bill
from p2pinfer.planning.hop_timings import KEEP_S, MAX_REMEMBERED, HopTimings
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.route import Candidate
from p2pinfer.session.stragglers import FEWEST_STEPS, FIRST_PAUSE_S, LONGEST_PAUSE_S, STEPS, Stragglers


def bills(*milliseconds: int) -> tuple[Bill, ...]:
    return tuple(Bill(0, each * 1000, each * 1000, 1) for each in milliseconds)


def test_the_slowest_hop_is_named_once_it_was_slow_for_some_steps() -> None:
    slowness = Stragglers(0.05)
    for _ in range(FEWEST_STEPS - 1):
        slowness.note(bills(5, 80, 60))
        assert slowness.take_slowest(0.0) is None
    slowness.note(bills(5, 80, 60))
    assert slowness.take_slowest(0.0) == (1, 0.08)


def test_a_single_slow_step_is_nothing() -> None:
    slowness = Stragglers(0.05)
    for step in range(STEPS):
        slowness.note(bills(5, 4000 if step == 3 else 5))
    assert slowness.take_slowest(0.0) is None


def test_steps_of_long_ago_and_of_other_hops_do_not_count() -> None:
    slowness = Stragglers(0.05)
    for _ in range(STEPS):
        slowness.note(bills(500))
    for _ in range(STEPS):
        slowness.note(bills(5))
    assert slowness.take_slowest(0.0) is None
    slowness.forget()
    slowness.note(bills(500, 5))
    assert slowness.take_slowest(0.0) is None


def test_looks_become_ever_rarer() -> None:
    slowness = Stragglers(0.05)
    for _ in range(STEPS):
        slowness.note(bills(80))
    looks: list[int] = [now for now in range(1000) if slowness.take_slowest(float(now))]
    assert looks[:4] == [0, FIRST_PAUSE_S, 3 * FIRST_PAUSE_S, 7 * FIRST_PAUSE_S]
    assert looks[-1] - looks[-2] == LONGEST_PAUSE_S


def test_what_was_measured_counts_for_a_while_and_for_all_of_a_span() -> None:
    paces = HopTimings()
    candidate = Candidate(Announcement("a", "m", "0" * 32, BlockSpan(0, 4), "float32", 10.0, 64, 1))
    assert paces.known(candidate, 0.0) is candidate
    paces.note("a", 2, 0.01, now=0.0)
    known = paces.known(candidate, KEEP_S - 1)
    assert known.compute_ms is not None
    assert abs(known.compute_ms - 20.0) < 1e-9
    assert paces.known(candidate, KEEP_S) is candidate
    for number in range(MAX_REMEMBERED):
        paces.note(f"other-{number}", 1, 0.01, now=0.0)
    assert paces.known(candidate, 0.0) is candidate
