"""Worker: the one thread that owns the device, and the continuous batcher in it.

trio tasks submit work and go on. The thread takes all that is ready, of all sessions, as one batch, has it
run itself, and lets it deliver its results in one turn of the event loop. While a batch computes, the next
one collects, and before it begins it waits a moment for sessions that are due back (see `return_times`). Work
of one session is done in the order it came, at most one piece in a batch. Prefill is bounded per batch and
decode steps ride along, so a long prompt delays nobody by more than one chunk. Clients take turns (see
`fair_queue`), and while others wait, nobody has more than `client_steps` decode steps in a batch.

What is computed is none of the batcher's business: see `Work`. Only this thread touches tensors on the device
and the lengths of leases; pages are reserved and given back in the event loop alone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import trio

from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.node.transport.counters import Counts

from .fair_queue import FairQueue
from .return_times import ReturnTimes

logger = logging.getLogger(__name__)

PATIENCE: Final = 1.0  # of the last decode batch's time: how long the next one may wait for sessions


class BatchReport(NamedTuple):
    """Times and size of a batch, in seconds of the worker's clock and in tokens."""

    started_at: float
    ran_s: float
    compute_s: float  # the same, and what finishing took
    tokens: int  # of the work that was run


class Work(Protocol):
    """Something to be done on the device, which knows how to do itself.

    A piece of work is run with others of an equal `batch_key`, is finished, and is delivered, in this order.
    What is not among what `run` returns was dropped, and is delivered without being finished. The attributes
    stay as they are while it waits.

    Attributes:
        batch_key: What it has in common with all that it may share a batch with: the kind, the device's part.
        session: Whose work is done in the order in which it came; what `Worker.release` is called with.
        client: Who takes turns with others.
        tokens: How much work it is.
        is_decode: True if it is so little that no limit on a batch's tokens holds it back.
        submitted_at: When it came, in seconds of the worker's clock.
    """

    @property
    def batch_key(self) -> object: ...
    @property
    def session(self) -> Hashable: ...
    @property
    def client(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def is_decode(self) -> bool: ...
    @property
    def submitted_at(self) -> float: ...

    def run(self, batch: Sequence[Any]) -> Sequence[Work]:
        """Do a batch, whose first piece this is; in the worker's thread.

        A batch that raises is run again piece by piece, so that only the guilty one fails.

        Returns:
            The pieces that were done; others are not wanted any more, or are not right.
        """
        ...

    def fail(self, error: Exception) -> None:
        """Take note of what `run` or `finish` raised; in the worker's thread."""
        ...

    def finish(self) -> None:
        """Do what is left, like encoding a result; in the worker's thread, while the event loop wakes up."""
        ...

    def deliver(self, report: BatchReport) -> None:
        """Hand the result to whom it is for; in the event loop. It must not raise."""
        ...


@dataclass(frozen=True, slots=True)
class _Call:
    """Something quick for the thread to call between batches."""

    function: Callable[[], None]


class Worker:
    """Runs work in batches, in a thread of its own. See `open_worker`."""

    def __init__(
        self,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        *,
        client_steps: int = 32,
        counts: Counts | None = None,
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._client_steps = client_steps
        self._counts = counts or Counts()
        self._clock = clock
        self._arrivals: queue.SimpleQueue[Work | _Call | None] = queue.SimpleQueue()
        self._newcomers: list[Work] = []  # what waits and is not in line yet
        self._line: FairQueue[Work] = FairQueue()
        # Counted, not asked of the line: `_gather` looks at every arrival, and the line may be long.
        self._waiting = 0  # in line, and newcomers
        self._waiting_prefills = 0
        self._returns: ReturnTimes[Hashable] = ReturnTimes()
        self._sessions = set[Hashable]()  # that have had work here and were not forgotten
        self._is_shared = False  # there are several
        self._patience_s = 0.0
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._work, name="p2pinfer-worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> threading.Thread:
        """Let the thread end after the batch at hand; returns it, to be joined."""
        self._arrivals.put(None)
        return self._thread

    @property
    def queued(self) -> int:
        """Pieces of work that wait, at about this moment."""
        return self._waiting + self._arrivals.qsize()

    @property
    def now(self) -> float:
        """Seconds of the clock that work is timed by."""
        return self._clock()

    def call(self, function: Callable[[], None]) -> None:
        """Have the worker's thread call something quick before what is submitted from here on."""
        self._arrivals.put(_Call(function))

    def submit(self, work: Work) -> None:
        """Queue work; returns at once. It is delivered in any case, until the worker closes."""
        self._arrivals.put(work)

    def release(self, lease: CacheLease) -> None:
        """Give a session's cache back, after whatever of it is being computed at the moment.

        The pages change hands in the event loop, where they are reserved: the cache is not for two threads.
        """

        def give_back() -> None:
            self._forget(lease)
            self._token.run_sync_soon(lease.release)

        self.call(give_back)

    def forget(self, session: Hashable) -> None:
        """Hold nothing of a session that submits no more, and wait for it no more; `release` does so too."""
        self.call(lambda: self._forget(session))

    def _forget(self, session: Hashable) -> None:
        self._sessions.discard(session)
        self._returns.forget(session)
        if len(self._sessions) < 2:
            # Whoever is left has nobody to wait for it, so when it comes and goes is not noted any more.
            self._is_shared = False
            self._returns = ReturnTimes()

    async def released(self) -> None:
        """Wait until every cache that was given to `release` before now is back."""
        back = trio.Event()
        self.call(lambda: self._token.run_sync_soon(back.set))
        await back.wait()

    def _work(self) -> None:
        while self._collect(None) and self._gather():
            while batch := self._next_batch():
                self._compute(batch)
                if not (self._collect(0) and self._gather()):
                    return

    def _collect(self, wait_s: float | None) -> bool:
        """Take in what has arrived, after a wait for the first of it; None waits for ever.

        Returns:
            False when the worker is to stop.
        """
        arrivals = self._arrivals
        try:
            while wait_s != 0 or not arrivals.empty():
                arrival = arrivals.get(timeout=wait_s)
                wait_s = 0
                if arrival is None:
                    return False
                if isinstance(arrival, _Call):
                    arrival.function()
                else:
                    self._newcomers.append(arrival)
                    self._waiting += 1
                    self._waiting_prefills += not arrival.is_decode
                    if arrival.session not in self._sessions:
                        self._sessions.add(arrival.session)
                        self._is_shared = len(self._sessions) > 1
                    if self._is_shared:
                        self._returns.arrive(arrival.session, arrival.submitted_at)
        except queue.Empty:
            pass
        return True

    def _gather(self) -> bool:
        """Let sessions that are due any moment join the next batch, if all that waits are decode steps.

        Returns:
            False when the worker is to stop.
        """
        if not self._is_shared:
            return True
        started = self._clock()
        # Waiting pays for decode steps alone. A batch with a prefill takes so long that those who are due
        # would be back for the one after it in any case.
        while self._waiting and not self._waiting_prefills:
            now = self._clock()
            left_s = self._returns.wait_until(now, started + self._patience_s - now) - now
            if left_s <= 0:
                return True
            if not self._collect(left_s):
                return False
        return True

    def _next_batch(self) -> list[Work]:
        """The next pieces that fit together."""
        newcomers = self._newcomers
        if self._waiting == 1 and newcomers:
            # Whoever is alone needs no line: afterwards it would be as if nothing had been in it.
            batch = newcomers
        else:
            for work in newcomers:
                self._line.add(work.client, work.tokens, work)
            batch = self._chosen() if self._waiting else []
        self._newcomers = []
        self._waiting -= len(batch)
        for work in batch:
            self._waiting_prefills -= not work.is_decode
        return batch

    def _chosen(self) -> list[Work]:
        """From the line: one piece a session, prefill bounded, and decode for each client."""
        batch: list[Work] = []
        taken: set[Hashable] = set()
        room = self._max_batch_tokens
        # A client has a limit only while others wait: alone it may fill the device.
        most_steps = self._client_steps if len(self._line.clients()) > 1 else self._waiting
        steps = Counter[str]()
        for work in self._line:
            if work.is_decode:
                fits = steps[work.client] < most_steps
            else:
                # The first prefill of a batch fits however long it is: it would wait for ever otherwise.
                fits = work.tokens <= room or room == self._max_batch_tokens
            if fits and work.session not in taken and (not batch or work.batch_key == batch[0].batch_key):
                batch.append(work)
                # Decode steps take none of the room, so a long prompt delays them by one batch and no more.
                room -= 0 if work.is_decode else work.tokens
                steps[work.client] += work.is_decode
            # Chosen or not: the work of a session runs in order, so nothing may overtake a piece of it that
            # has to wait. Skipping the piece alone would compute on a cache that lacks positions.
            taken.add(work.session)
        self._line.take(batch)
        return batch

    def _compute(self, batch: list[Work]) -> None:
        started = self._clock()
        done = self._run(batch)
        ran_s = self._clock() - started
        with suppress(trio.RunFinishedError):  # a quarter of a millisecond, in which results are finished
            self._token.run_sync_soon(_nothing, idempotent=True)
        tokens, all_decode = 0, True
        for work in done:
            tokens += work.tokens
            all_decode &= work.is_decode
            try:
                work.finish()
            except Exception as exc:  # as in `_run`
                logger.exception("a step of %s tokens was computed and cannot be sent", work.tokens)
                work.fail(exc)
        seconds = self._clock() - started
        if done:
            counted = self._counts.counted
            counted["batches", ""] += 1
            counted["steps", ""] += len(done)
            counted["tokens", ""] += tokens
        try:
            self._token.run_sync_soon(_deliver, batch, BatchReport(started, ran_s, seconds, tokens))
        except trio.RunFinishedError:
            logger.debug("the event loop ended before %s results", len(batch))
        # While the event loop wakes up:
        if self._is_shared:
            self._let_go(done, started + seconds)
        if all_decode:
            self._patience_s = PATIENCE * seconds

    def _let_go(self, done: Sequence[Work], now: float) -> None:
        """Note who is to come back; who prefills, or has more steps here already, is not waited for."""
        here = {work.session for work in self._line} if self._waiting else ()
        for work in done:
            if work.is_decode and work.session not in here:
                self._returns.leave(work.session, now)
            else:
                self._returns.forget(work.session)

    def _run(self, batch: list[Work]) -> Sequence[Work]:
        """Run a batch, or its pieces one by one if that fails; returns what was done or failed."""
        # One faulty piece fails all that are computed with it, so a batch that fails is taken apart: the
        # sessions of the others go on. Running pieces one by one in the first place would give up what a
        # batch gains.
        try:
            return batch[0].run(batch)
        except Exception as exc:  # whatever went wrong, the session must hear of it and the thread go on
            if len(batch) > 1:
                return [each for work in batch for each in self._run([work])]
            logger.exception("a step of %s tokens failed", batch[0].tokens)
            batch[0].fail(exc)
            return batch


def _nothing() -> None: ...


def _deliver(batch: list[Work], report: BatchReport) -> None:
    for work in batch:
        work.deliver(report)


@asynccontextmanager
async def open_worker(
    max_batch_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    client_steps: int = 32,
    counts: Counts | None = None,
) -> AsyncGenerator[Worker]:
    """Open a running worker; on exit it finishes the batch at hand and its thread ends."""
    worker = Worker(max_batch_tokens, clock, client_steps=client_steps, counts=counts)
    worker.start()
    try:
        yield worker
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(worker.stop().join)
