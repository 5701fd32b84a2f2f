"""Shares of what all hold together."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.node.serve.quota import Quota, exceeds_share, left_of_share


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


@dataclass(eq=False)
class Held:
    """A reservation of a session that has filled half of `earned`."""

    client: str
    held: int
    earned: int = 0
    address_range: str = ""

    def __post_init__(self) -> None:
        self.address_range = self.address_range or self.client

    def give_back(self) -> None:
        self.held = min(self.held, self.earned)


def pool(total: int, *reservations: Held, share: float = 0.75) -> Quota:
    quota = Quota(lambda: total - sum(each.held for each in reservations), share)
    for each in reservations:
        quota.add(each)
    return quota


def test_what_was_reserved_and_never_used_keeps_nobody_out() -> None:
    greedy = [Held(f"greedy{number}", 125) for number in range(8)]
    quota = pool(1000, *greedy)
    assert quota.left_for("honest", "honest") == 750
    quota.make_room(500, "honest")
    assert sorted(each.held for each in greedy) == [0, 0, 0, 0, 125, 125, 125, 125]


def test_what_was_used_stays() -> None:
    worker, idler = Held("worker", 400, earned=300), Held("idler", 600, earned=10)
    quota = pool(1000, worker, idler)
    assert quota.left_for("honest", "honest") == int(0.75 * 690)
    quota.make_room(690, "honest")
    assert (worker.held, idler.held) == (300, 10)
    assert not quota.may_grow(worker, 1000)


def test_ones_own_reservations_count_whether_used_or_not() -> None:
    greedy = Held("greedy", 700)
    quota = pool(1000, greedy)
    assert quota.left_for("greedy", "greedy") == 50
    quota.make_room(400, "greedy")
    assert greedy.held == 700


def test_identities_of_one_address_range_have_one_clients_part_of_what_is_used() -> None:
    crowd = [Held(f"crowd{number}", 100, earned=100, address_range="192.0.2.0/24") for number in range(7)]
    quota = pool(1000, *crowd)
    assert quota.left_for("eighth", "192.0.2.0/24") == 50
    assert quota.left_for("honest", "198.51.100.0/24") == 225
    assert not quota.may_grow(crowd[0], 51)
    assert quota.may_grow(crowd[0], 50)


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 300), st.integers(0, 3)), max_size=12),
    st.integers(0, 3000),
)
def test_no_more_is_taken_back_than_is_missing_and_nothing_that_was_used(
    kept: list[tuple[int, int, int]], amount: int
) -> None:
    held = [Held(f"c{number}", *each[:2], f"r{each[2]}") for number, each in enumerate(kept)]
    quota = pool(3000, *held)
    before = [each.held for each in held]
    free = 3000 - sum(before)
    lendable = quota.lendable
    quota.make_room(amount)
    taken = [was - each.held for was, each in zip(before, held, strict=True)]
    assert all(each.held >= min(was, each.earned) for was, each in zip(before, held, strict=True))
    assert free + sum(taken) >= min(amount, lendable)
    if taken and free < amount:
        assert free + sum(taken) - max(taken) < amount
    elif free >= amount:
        assert not any(taken)
