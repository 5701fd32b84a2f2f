"""Parallel work on many bytes, with progress and cancellation by the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Event
from typing import TypeVar

from p2pinfer.models.progress import Progress, Silent

_HEARTBEAT_S = 0.2

Result = TypeVar("Result")
Count = Callable[[int], None]  # what a job calls for every piece of its work; raises when it is to stop


class Stopped(Exception):
    """The work is not wanted any more."""


def run_counted(
    jobs: Sequence[Callable[[Count], Result]],
    *,
    label: str,
    total_bytes: int,
    threads: int,
    progress: Progress | None = None,
) -> list[Result]:
    """The results of the jobs, in order.

    `progress` is called by the calling thread only, and several times a second, also when nothing advances.
    Whatever it raises (or Ctrl-C does), and the first error of a job, stops the other jobs at their next
    piece: that is how a download is cancelled.
    """
    progress = progress or Silent()
    counts: SimpleQueue[int] = SimpleQueue()
    stop = Event()

    def count(n: int) -> None:
        if stop.is_set():
            raise Stopped
        counts.put(n)

    progress.start(label, total_bytes)
    try:
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(job, count) for job in jobs]
            for future in futures:
                future.add_done_callback(lambda _: counts.put(0))  # wakes the loop below
            try:
                _watch(futures, counts, progress)
                return [future.result() for future in futures]
            finally:
                stop.set()
                for future in futures:
                    future.cancel()
    finally:
        progress.done()


def _watch(futures: Sequence[Future[Result]], counts: SimpleQueue[int], progress: Progress) -> None:
    """Report until all jobs are done; raise the first error of one."""
    waiting = list(futures)
    while waiting:
        try:
            n = counts.get(timeout=_HEARTBEAT_S)
            while not counts.empty():
                n += counts.get()
        except Empty:
            n = 0
        progress.advance(n)
        for future in [future for future in waiting if future.done()]:
            future.result()
            waiting.remove(future)
    while not counts.empty():
        progress.advance(counts.get())
