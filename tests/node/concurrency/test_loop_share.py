"""Who takes how much of the event loop, and who waits for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.concurrency.loop_share import (
    BYTE_READ_S,
    DROP_S,
    STEP_READ_S,
    WINDOW_S,
    LoopShares,
    Meter,
    Overspent,
    clocked,
    fair_level,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(
    shares: LoopShares,
    clock: Clock,
    wants: dict[tuple[str, str], float],
    seconds: float,
    each_tick: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """What peers come to take each second who want so much of it, given as (peer, range) -> share."""
    tick = 0.05
    taken = dict.fromkeys([peer for peer, _ in wants], 0.0)
    paused_until = dict.fromkeys(wants, 0.0)
    for _ in range(int(seconds / tick)):
        clock.now += tick
        each_tick()
        for (peer, address_range), share in wants.items():
            if paused_until[peer, address_range] > clock.now:
                continue
            shares.spend(peer, address_range, share * tick)
            taken[peer] += share * tick
            paused_until[peer, address_range] = clock.now + shares.pause_s(peer, address_range)
    return {peer: each / seconds for peer, each in taken.items()}


def compute(meter: Meter, payload_bytes: int) -> None:
    meter.steps += 1
    meter.step_bytes += payload_bytes


def test_nobody_waits_while_all_together_take_little() -> None:
    clock = Clock()
    shares = LoopShares(0.25, clock)
    taken = run(shares, clock, {("a", "r"): 0.1, ("b", "r"): 0.1}, 60)
    assert taken == pytest.approx({"a": 0.1, "b": 0.1}, rel=0.01)


def test_a_flood_gets_what_the_others_leave_and_they_never_wait() -> None:
    clock = Clock()
    shares = LoopShares(0.25, clock)
    wants = {("flood", "x"): 1.0, ("neighbour", "y"): 0.01, ("client", "z"): 0.05}
    taken = run(shares, clock, wants, 120)
    assert taken["neighbour"] == pytest.approx(0.01, rel=0.01)
    assert taken["client"] == pytest.approx(0.05, rel=0.01)
    assert 0.15 < taken["flood"] < 0.24


def test_identities_of_one_range_share_what_one_would_get_and_the_light_among_them_do_not_wait() -> None:
    clock = Clock()
    shares = LoopShares(0.25, clock)
    crowd = {(f"flood{number}", "crowd"): 0.5 for number in range(20)}
    wants = {**crowd, ("neighbour", "crowd"): 0.002, ("other flood", "elsewhere"): 0.5}
    taken = run(shares, clock, wants, 120)
    assert taken["neighbour"] == pytest.approx(0.002, rel=0.01)
    together = sum(share for peer, share in taken.items() if peer.startswith("flood"))
    assert 0.08 < together < 0.2  # with what 20 newcomers take before anybody knows them
    assert 0.08 < taken["other flood"] < 0.2


def test_a_flood_gets_less_while_steps_are_computed() -> None:
    clock = Clock()
    shares = LoopShares(0.25, clock, most_at_work=0.1)
    wants = {("flood", "x"): 1.0, ("neighbour", "y"): 0.01}
    idle = run(shares, clock, wants, 120)
    at_work = run(shares, clock, wants, 120, shares.note_step)
    idle_again = run(shares, clock, wants, 120)
    assert 0.15 < idle["flood"] < 0.26 and 0.15 < idle_again["flood"] < 0.26
    assert 0.05 < at_work["flood"] < 0.1
    assert at_work["neighbour"] == pytest.approx(0.01, rel=0.01)


def test_a_step_pays_for_its_own_reading_and_for_no_more() -> None:
    clock = Clock()
    shares = LoopShares(0.25, clock)
    client, loiterer = shares.meter("client", "r"), shares.meter("loiterer", "s")
    for _ in range(10_000):  # 100 s
        clock.now += 0.01
        compute(client, 1280)
        client.spend(STEP_READ_S)
        loiterer.spend(0.01)
        if clock.now % 10 < 0.01:
            compute(loiterer, 1280)
    assert shares.pause_s("client", "r") == 0
    assert shares.pause_s("loiterer", "s") > 1
    big, size = shares.meter("big", "t"), 4 << 20
    for _ in range(100):
        clock.now += 0.1
        big.spend(size * BYTE_READ_S)
        compute(big, size)
    assert shares.pause_s("big", "t") == 0


def test_whether_anybody_has_to_wait_is_known_without_asking_for_each_message() -> None:
    clock = Clock()
    shares = LoopShares(0.25, clock)
    shares.spend("a", "r", 0.2)
    assert not shares.is_over
    shares.spend("a", "r", 4.0)
    assert shares.is_over
    clock.now += 60
    assert shares.pause_s("a", "r") == 0
    assert not shares.is_over


def test_a_peer_that_stops_is_forgiven() -> None:
    clock = Clock()
    shares = LoopShares(0.25, clock)
    shares.spend("a", "r", 4.0)
    assert shares.pause_s("a", "r") == pytest.approx(WINDOW_S * math.log(1 / 0.25))
    clock.now += 3 * WINDOW_S
    assert shares.pause_s("a", "r") == 0


@given(st.lists(st.floats(0, 10), max_size=30), st.floats(0.01, 10))
def test_the_level_is_max_min_fair(amounts: list[float], most: float) -> None:
    level = fair_level(amounts, most)
    cut = [min(amount, level) for amount in amounts]
    assert sum(cut) <= most * (1 + 1e-9)
    if level < math.inf:  # nothing is left over
        assert sum(cut) == pytest.approx(most)
    else:
        assert sum(amounts) <= most * (1 + 1e-9)


async def test_a_peer_that_had_to_wait_for_too_long_is_given_up(autojump_clock: object) -> None:
    shares = LoopShares(0.25)
    meter = shares.meter("flood", "r")
    began = trio.current_time()
    with pytest.raises(Overspent, match="flood"):
        while True:
            meter.spend(2.0)
            await meter.pause()
    assert DROP_S <= trio.current_time() - began < 4 * DROP_S
    await shares.meter("another", "r").pause()


@pytest.mark.parametrize("kind", ["many that take a little", "one whose steps are computed"])
async def test_whoever_is_not_to_blame_only_waits(autojump_clock: object, kind: str) -> None:
    """A bootstrap node with many neighbours may have more to do than it should."""
    shares = LoopShares(0.25)
    count = 50 if kind == "many that take a little" else 1
    meters = [shares.meter(f"peer{number}", f"range{number}") for number in range(count)]
    waited = 0.0

    async def gossip(meter: Meter) -> None:
        nonlocal waited
        if count == 1:
            compute(meter, 1280)
        while trio.current_time() < 60:
            await trio.sleep(1)
            meter.spend(1.0 / count)  # a whole core, all together
            began = trio.current_time()
            await meter.pause()
            waited += trio.current_time() - began

    async with trio.open_nursery() as nursery:
        for meter in meters:
            nursery.start_soon(gossip, meter)
    assert waited / count > 30


async def test_only_the_time_of_the_work_itself_is_counted() -> None:
    told: list[float] = []
    now = 0.0
    work_waits, others_worked = trio.Event(), trio.Event()

    def burn(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def work() -> str:
        burn(0.02)
        work_waits.set()
        await others_worked.wait()
        burn(0.02)
        return "done"

    async def others() -> None:
        await work_waits.wait()
        burn(0.05)
        others_worked.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        assert await clocked(work(), told.append, lambda: now) == "done"
    assert sum(told) == pytest.approx(0.04)


async def test_the_clock_is_that_of_this_thread() -> None:
    """That it waits for a core, or for a thread that computes, is no peer's doing."""
    told: list[float] = []

    async def work() -> None:
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass
        time.sleep(0.1)

    began = time.thread_time()
    await clocked(work(), told.append)
    assert 0.01 <= sum(told) <= time.thread_time() - began


async def test_small_parts_are_told_of_together_and_the_rest_at_the_end() -> None:
    told: list[float] = []
    now = 0.0

    async def work() -> None:
        nonlocal now
        for _ in range(25):
            now += 0.0001
            await trio.lowlevel.checkpoint()

    await clocked(work(), told.append, lambda: now)
    assert sum(told) == pytest.approx(0.0025)
    assert len(told) <= 3


async def test_errors_and_cancellations_pass_through_the_clock(autojump_clock: object) -> None:
    cleaned = False

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError("its own")

    async def wait() -> None:
        nonlocal cleaned
        try:
            await trio.sleep_forever()
        finally:
            cleaned = True

    with pytest.raises(ValueError, match="its own"):
        await clocked(fail(), lambda _: None)
    with trio.move_on_after(1) as scope:
        await clocked(wait(), lambda _: None)
    assert scope.cancelled_caught and cleaned
