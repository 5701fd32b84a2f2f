from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.serve.return_times import ReturnTimes


def returned(*seconds: float) -> ReturnTimes[str]:
    """A session "a" that came back after each of these times, and left again at 0."""
    returns: ReturnTimes[str] = ReturnTimes()
    for each in seconds:
        returns.leave("a", 0)
        returns.arrive("a", each)
    returns.leave("a", 0)
    return returns


def test_nobody_is_awaited_who_has_never_come_back() -> None:
    returns: ReturnTimes[str] = ReturnTimes()
    returns.leave("a", 0)
    assert returns.wait_until(1, 100) == 1


def test_nobody_is_awaited_who_is_here_or_over() -> None:
    returns = returned(3)
    returns.arrive("a", 1)
    assert returns.wait_until(1, 100) == 1
    returns = returned(3)
    returns.forget("a")
    returns.forget("a")
    returns.arrive("a", 2)
    assert returns.wait_until(1, 100) == 1


def test_a_session_is_awaited_until_it_is_late_by_two_deviations() -> None:
    assert returned(3).wait_until(1, 100) == 3 + 2 * 1.5
    assert returned(*[3] * 100).wait_until(1, 100) == pytest.approx(3)


def test_patience_bounds_the_wait_and_who_is_due_later_is_not_awaited() -> None:
    assert returned(3).wait_until(1, 4) == 5
    assert returned(3).wait_until(1, 1.5) == 1


@given(
    st.dictionaries(st.text(max_size=2), st.lists(st.floats(0, 1e6), max_size=5)),
    st.floats(0, 1e6),
    st.floats(0, 1e6),
)
def test_a_wait_never_begins_in_the_past_nor_outlasts_patience(
    sessions: dict[str, list[float]], now: float, patience: float
) -> None:
    returns: ReturnTimes[str] = ReturnTimes()
    for session, times in sessions.items():
        for each in times:
            returns.leave(session, 0)
            returns.arrive(session, each)
        returns.leave(session, 0)
    assert now <= returns.wait_until(now, patience) <= now + patience
