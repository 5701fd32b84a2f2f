"""Shares of what all hold together."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.node.serve.quota import exceeds_share, left_of_share


def fill(total: int, clients: int, share: float) -> list[int]:
    """What greedy clients come to hold, who ask in turn for one more until all are refused."""
    held = [0] * clients
    refused = 0
    while refused < clients:
        refused = 0
        for client in range(clients):
            free = total - sum(held) - 1
            if free < 0 or exceeds_share(held[client] + 1, free, share):
                refused += 1
            else:
                held[client] += 1
    return held


def test_whoever_is_alone_gets_the_share_and_leaves_the_rest() -> None:
    assert fill(100, 1, 0.75) == [75]


def test_two_greedy_clients_get_the_same_and_leave_something() -> None:
    assert fill(700, 2, 0.75) == [300, 300]


def test_a_share_of_one_is_no_limit() -> None:
    assert fill(10, 1, 1.0) == [10]


@settings(deadline=None)  # a shared machine may be slow
@given(st.integers(1, 8), st.integers(50, 2000), st.sampled_from([0.25, 0.5, 0.75]))
def test_however_many_are_greedy_a_newcomer_finds_room(clients: int, total: int, share: float) -> None:
    held = fill(total, clients, share)
    left = total - sum(held)
    assert max(held) - min(held) <= 1
    assert left >= (1 - share) / share * max(held) - 1


@given(
    held=st.integers(0, 1 << 20),
    free=st.integers(0, 1 << 20),
    share=st.floats(0.01, 1),
    more=st.integers(0, 1 << 21),
)
def test_what_is_left_of_a_share_may_be_taken_and_no_more(
    held: int, free: int, share: float, more: int
) -> None:
    left = left_of_share(held, free, share)
    assert left == 0 or not exceeds_share(held + left, free - left, share)
    if left < more <= free:
        assert exceeds_share(held + more, free - more, share)
