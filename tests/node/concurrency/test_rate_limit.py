"""Token buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.concurrency.rate_limit import RateLimit


def test_a_burst_is_allowed_and_then_the_rate() -> None:
    limit = RateLimit(per_s=0.5, at_once=3)
    assert [limit.take("a", 10.0) for _ in range(4)] == [True, True, True, False]
    assert not limit.take("a", 11.0)
    assert limit.take("a", 12.0)
    assert not limit.take("a", 12.0)
    assert [limit.take("a", 1000.0) for _ in range(4)] == [True, True, True, False]


def test_everybody_has_an_allowance_of_their_own() -> None:
    limit = RateLimit(per_s=1.0, at_once=1)
    assert limit.take("a", 0.0)
    assert limit.take("b", 0.0)
    assert not limit.take("a", 0.0)


def test_only_so_many_are_remembered_and_the_quietest_are_forgotten() -> None:
    limit = RateLimit(per_s=0.0, at_once=1, max_remembered=2)
    for key in ("a", "b", "a", "c"):  # a spoke after b
        limit.take(key, 0.0)
    assert not limit.take("a", 0.0)
    assert limit.take("b", 0.0)


@given(st.lists(st.floats(0, 100), max_size=60))
def test_no_more_is_allowed_than_burst_and_rate_add_up_to(times: list[float]) -> None:
    limit = RateLimit(per_s=0.5, at_once=3)
    times.sort()
    allowed = sum(limit.take("a", now) for now in times)
    assert allowed <= 3 + (times[-1] - times[0]) * 0.5 if times else True
