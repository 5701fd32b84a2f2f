from __future__ import annotations

import threading
from functools import partial

import pytest

from p2pinfer.models.checkpoint.parallel import Count, Stopped, run_counted


class Bar:
    """Counts, and notes which threads call it."""

    def __init__(self, raises: BaseException | None = None) -> None:
        self.seen, self.beats, self.ended = 0, 0, 0
        self.threads: set[int] = set()
        self.raises = raises

    def start(self, label: str, total_bytes: int) -> None:
        self.threads.add(threading.get_ident())

    def advance(self, n: int) -> None:
        self.threads.add(threading.get_ident())
        self.seen += n
        self.beats += 1
        if self.raises is not None:
            raise self.raises

    def done(self) -> None:
        self.ended += 1


def test_results_come_in_order_and_every_byte_is_counted_by_the_caller() -> None:
    def counting(number: int, count: Count) -> int:
        for _ in range(100):
            count(number)
        return number

    bar = Bar()
    jobs = [partial(counting, number) for number in range(5)]
    assert run_counted(jobs, label="work", total_bytes=1000, threads=3, progress=bar) == [0, 1, 2, 3, 4]
    assert (bar.seen, bar.ended) == (100 * (1 + 2 + 3 + 4), 1)
    assert bar.threads == {threading.get_ident()}


def test_the_first_error_stops_the_others_at_their_next_piece() -> None:
    stopped = threading.Event()

    def endless(count: Count) -> None:
        try:
            while True:
                count(0)
        except Stopped:
            stopped.set()
            raise

    def failing(_: Count) -> None:
        raise ValueError("broken")

    bar = Bar()
    with pytest.raises(ValueError, match="broken"):
        run_counted([endless, failing, endless], label="", total_bytes=0, threads=2, progress=bar)
    assert stopped.is_set()
    assert bar.ended == 1


def test_whoever_watches_can_stop_the_work_even_while_nothing_advances() -> None:
    released = threading.Event()

    def stuck(count: Count) -> None:
        assert released.wait(10)
        count(1)

    class Leaving(Bar):
        def advance(self, n: int) -> None:
            released.set()
            raise KeyboardInterrupt

    bar = Leaving()
    with pytest.raises(KeyboardInterrupt):
        run_counted([stuck], label="", total_bytes=0, threads=1, progress=bar)
    assert bar.ended == 1


def test_nobody_has_to_watch() -> None:
    assert run_counted([lambda count: count(3)], label="", total_bytes=3, threads=1) == [None]
