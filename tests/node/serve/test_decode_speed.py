from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.serve.decode_speed import LEAST, LEAST_STEPS, MOST, WINDOW_S, DecodeSpeed, bounded


def speed_of(start: float, steps: list[float], *, every_s: float = 0.1) -> DecodeSpeed:
    speed = DecodeSpeed(start)
    for index, seconds in enumerate(steps):
        speed.steps.append((index * every_s, seconds))
    return speed


def test_what_was_measured_at_the_start_gives_way_to_what_steps_take() -> None:
    """At the start the computer was busy and 21 came out; it gives 152."""
    assert speed_of(21, []).tokens_per_s == 21
    assert speed_of(21, [1 / 152] * (LEAST_STEPS - 1)).tokens_per_s == 21
    assert speed_of(21, [1 / 152] * LEAST_STEPS).tokens_per_s == pytest.approx(152)
    assert speed_of(286, [1 / 110] * 20).tokens_per_s == pytest.approx(110)


def test_a_few_steps_that_something_came_between_change_little() -> None:
    assert speed_of(100, [0.01] * 40 + [3.0] * 15).tokens_per_s == pytest.approx(100)


def test_a_change_that_lasts_is_followed() -> None:
    assert speed_of(100, [0.01] * 64 + [0.05] * 40).tokens_per_s == pytest.approx(20)


def test_steps_of_a_while_ago_count_for_nothing_beside_later_ones() -> None:
    speed = speed_of(100, [0.01] * 64)
    for step in range(LEAST_STEPS):
        speed.steps.append((6.3 + WINDOW_S + 1 + step, 0.05))
    assert speed.tokens_per_s == pytest.approx(20)


def test_after_a_change_only_what_was_measured_since_counts() -> None:
    speed = speed_of(100, [0.05] * 64)
    speed.restart([0.005] * 8, 10.0)
    assert speed.tokens_per_s == pytest.approx(200)


def test_only_a_material_difference_is_told() -> None:
    speed = speed_of(100, [0.01] * 10)
    assert not speed.differs(100)
    assert not speed.differs(85)
    assert not speed.differs(120)
    assert speed.differs(50)
    assert speed.differs(200)


ANYTHING = st.one_of(st.floats(), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-300]))


@given(start=ANYTHING, steps=st.lists(ANYTHING, max_size=100), now=st.floats(0, 1e6))
def test_whatever_a_clock_says_the_speed_can_be_announced(
    start: float, steps: list[float], now: float
) -> None:
    speed = DecodeSpeed(start)
    for seconds in steps:
        speed.steps.append((now, seconds))
        assert LEAST <= speed.tokens_per_s <= MOST
    speed.restart(steps, now)
    assert LEAST <= speed.tokens_per_s <= MOST
    assert LEAST <= bounded(start) <= MOST


def test_nothing_is_said_of_chunks_before_there_was_one() -> None:
    assert speed_of(100, [0.01] * 10).chunk_cost == (0.0, 0.0)


def test_the_cost_of_chunks_is_a_line_from_a_step_through_them() -> None:
    speed = speed_of(1, [0.02] * LEAST_STEPS)
    speed.chunks.extend((tokens, 0.019 + 0.001 * tokens) for tokens in (20, 100, 256))
    assert speed.chunk_cost == pytest.approx((0.019, 0.001))
    speed.restart([0.02] * LEAST_STEPS, 10.0)
    assert speed.chunk_cost == (0.0, 0.0)


@given(start=ANYTHING, chunks=st.lists(st.tuples(st.integers(1, 5000), ANYTHING), max_size=40))
def test_the_cost_of_chunks_is_one_of_positive_seconds(start: float, chunks: list[tuple[int, float]]) -> None:
    speed = DecodeSpeed(start)
    speed.chunks.extend(chunks)
    cost = speed.chunk_cost
    assert cost == (0.0, 0.0) or (cost[0] >= 0 and 0 < sum(cost) < 2 / LEAST)
