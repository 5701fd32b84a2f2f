"""Who is next when several clients wait."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.node.serve.fair_queue import FairQueue


class Job:
    def __init__(self, client: str, number: int, cost: int) -> None:
        self.client, self.number, self.cost = client, number, cost

    def __repr__(self) -> str:
        return f"{self.client}{self.number}"


def line_of(*jobs: Job) -> FairQueue[Job]:
    line = FairQueue[Job]()
    for job in jobs:
        line.add(job.client, job.cost, job)
    return line


def test_one_client_waits_as_in_any_line() -> None:
    jobs = [Job("a", number, cost) for number, cost in enumerate((5, 1, 300, 2))]
    line = line_of(*jobs)
    assert [*line] == jobs
    assert line.clients() == {"a"}


def test_clients_with_one_job_each_are_served_as_they_came() -> None:
    jobs = [Job(client, 0, cost) for client, cost in (("b", 300), ("a", 1), ("c", 7))]
    assert [*line_of(*jobs)] == jobs


def test_a_newcomer_is_next_however_long_the_line_is() -> None:
    greedy = [Job("greedy", number, 256) for number in range(100)]
    line = line_of(*greedy)
    line.take(greedy[:3])
    newcomer = Job("new", 0, 256)
    line.add("new", 256, newcomer)
    assert [*line].index(newcomer) <= 1
    assert len(line) == 98


def test_who_comes_back_has_saved_nothing_up() -> None:
    """A client that was away gets its turn, not all the turns it has missed."""
    greedy = [Job("greedy", number, 100) for number in range(20)]
    line = line_of(*greedy)
    for job in greedy[:10]:
        line.take([job])
    back = [Job("back", number, 100) for number in range(10)]
    for job in back:
        line.add("back", 100, job)
    first = [job.client for job in line][:10]
    assert 4 <= first.count("back") <= 6


@settings(deadline=None)  # a shared machine may be slow
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 512)), min_size=1, max_size=60), st.data())
def test_jobs_of_one_client_keep_their_order_and_none_is_lost(
    asked: list[tuple[str, int]], data: st.DataObject
) -> None:
    jobs = [Job(client, number, cost) for number, (client, cost) in enumerate(asked)]
    line = FairQueue[Job]()
    waiting, done = list(jobs), list[Job]()
    while waiting or len(line):
        if waiting and (not len(line) or data.draw(st.booleans())):
            job = waiting.pop(0)
            line.add(job.client, job.cost, job)
        else:
            job = next(iter(line))
            line.take([job])
            done.append(job)
    assert {id(job) for job in done} == {id(job) for job in jobs}
    for client in "abc":
        numbers = [job.number for job in done if job.client == client]
        assert numbers == sorted(numbers)


@settings(deadline=None)  # a shared machine may be slow
@given(st.integers(1, 512), st.integers(1, 512))
def test_two_who_always_have_work_get_the_same_of_it(cost_a: int, cost_b: int) -> None:
    line = line_of(*(Job("a", n, cost_a) for n in range(600)), *(Job("b", n, cost_b) for n in range(600)))
    work = {"a": 0, "b": 0}
    while sum(work.values()) < 512 * 8 and line.clients() == {"a", "b"}:
        job = next(iter(line))
        line.take([job])
        work[job.client] += job.cost
    assert abs(work["a"] - work["b"]) <= max(cost_a, cost_b)


def test_clients_that_are_gone_are_forgotten() -> None:
    line = FairQueue[Job]()
    busy = [Job("busy", number, 1) for number in range(1000)]
    for job in busy[:500]:
        line.add("busy", 1, job)
    for number in range(500):
        visitor = Job(f"visitor {number}", 0, 1)
        line.add(visitor.client, 1, visitor)
        line.take([visitor, busy[number]])
        line.add("busy", 1, busy[500 + number])
    assert len(line._next_turns) < 2 * len(line) + 20  # pyright: ignore[reportPrivateUsage]
    line.take([*line])
    assert not line._next_turns  # pyright: ignore[reportPrivateUsage]
