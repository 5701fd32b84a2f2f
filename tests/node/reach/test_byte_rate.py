"""Keeping to a rate."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.reach.byte_rate import Throttle


def test_a_burst_goes_at_once_and_the_rest_waits() -> None:
    throttle = Throttle(1000, burst_s=1.0)
    assert throttle.delay_s(1000, 50.0) == 0
    assert throttle.delay_s(500, 50.0) == 0.5
    assert throttle.delay_s(500, 50.0) == 1.0
    assert throttle.delay_s(500, 60.0) == 0


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 5)), max_size=50))
def test_no_more_than_the_rate_passes_in_the_long_run(pieces: list[tuple[int, float]]) -> None:
    throttle, now, passed, last = Throttle(1000, burst_s=1.0), 0.0, 0, 0.0
    for size, pause_s in pieces:
        now += pause_s
        passed += size
        last = now + throttle.delay_s(size, now)
        assert passed <= 1000 * (last + 1.0) + 1e-3
