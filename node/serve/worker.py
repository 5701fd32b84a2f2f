"""The one thread that owns the device, and the continuous batcher in it.

trio tasks submit jobs and go on; the thread takes every job that is ready, of all sessions, as one packed
batch, and hands the outputs back to the event loop in one call per batch. While a batch computes, the next
one collects, and before it begins it waits a moment for sessions that are due back (see `returns`). Jobs of
one session run in the order they came, at most one of them in a batch. Prefill is bounded per batch and
decode steps ride along, so a long prompt delays nobody by more than one chunk. Clients take turns (see
`fair`), and while others wait, nobody has more than `client_steps` decode steps in a batch.

Only this thread touches tensors on the device and the lengths of leases; pages are reserved and given back
in the event loop alone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

import trio
from torch import Tensor

from p2pinfer.errors import P2PInferError
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.transport.counters import Counts

from .fair_queue import FairQueue
from .return_times import ReturnTimes

logger = logging.getLogger(__name__)

DECODE_TOKENS: Final = 16  # a step of at most this many tokens is never held back by a batch's token limit
PATIENCE: Final = 1.0  # of the last decode batch's time: how long the next one may wait for sessions


class Runner(Protocol):
    """What the worker needs of a `SpanRunner`."""

    def run(self, chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a job. Times are seconds, taken in the worker's thread."""

    output: Tensor | None  # (tokens, hidden); None if the job was dropped or failed
    error: Exception | None
    queue_s: float
    compute_s: float
    batch_tokens: int
    payload: bytes = b""  # the output as the job's `encode` has it travel


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A chunk to compute. `is_stale` is asked once, just before computing: True drops it unread."""

    chunk: Chunk
    span: BlockSpan  # the blocks to run; only jobs of the same span share a batch
    is_stale: Callable[[], bool]
    on_done: Callable[[Done], None]  # called in the event loop
    submitted_at: float  # seconds of the worker's clock
    client: str = ""  # whose it is
    check: Callable[[], None] | None = (
        None  # what raises if the chunk must not be computed; may take its time
    )
    encode: Callable[[Tensor], bytes] | None = None  # the same for the output on its way out

    @property
    def is_decode(self) -> bool:
        """Whether this is a step rather than a piece of a prompt."""
        return len(self.chunk.hidden) <= DECODE_TOKENS


class Worker:
    """Computes jobs in batches, in a thread of its own. See `open_worker`."""

    def __init__(
        self,
        runner: Runner,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        *,
        client_steps: int = 32,
        counts: Counts | None = None,
        on_step: Callable[[BlockSpan, float], None] | None = None,
    ) -> None:
        self._runner = runner
        self._max_batch_tokens = max_batch_tokens
        self._client_steps = client_steps
        self._counts = counts or Counts()
        self._on_step = on_step
        self._clock = clock
        self._arrivals: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: FairQueue[Job] = FairQueue()
        self._returns: ReturnTimes[CacheLease] = ReturnTimes()
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
        """How many jobs wait, at about this moment."""
        return len(self._waiting) + self._arrivals.qsize()

    @property
    def now(self) -> float:
        """Seconds of the clock that jobs are timed by."""
        return self._clock()

    def call(self, function: Callable[[], None]) -> None:
        """Have the worker's thread call something quick before what is submitted from here on."""
        self._arrivals.put(function)

    def submit(self, job: Job) -> None:
        """Queue a job; returns at once. Its `on_done` is called in any case, until the worker closes."""
        self._arrivals.put(job)

    def release(self, lease: CacheLease) -> None:
        """Give a session's cache back, after whatever of it is being computed at the moment.

        The pages change hands in the event loop, where they are reserved: the cache is not for two threads.
        """

        def forget() -> None:
            self._returns.forget(lease)
            self._token.run_sync_soon(lease.release)

        self._arrivals.put(forget)

    async def released(self) -> None:
        """Wait until every cache that was given to `release` before now is back."""
        back = trio.Event()
        self._arrivals.put(lambda: self._token.run_sync_soon(back.set))
        await back.wait()

    def _work(self) -> None:
        while self._collect(None) and self._gather():
            while batch := self._next_batch():
                self._compute(batch)
                if not (self._collect(0) and self._gather()):
                    return

    def _collect(self, wait_s: float | None) -> bool:
        """Move what has arrived to the waiting line, after a wait for the first of it; None waits for ever.

        Returns:
            False when the worker is to stop.
        """
        try:
            while wait_s != 0 or not self._arrivals.empty():
                arrival = self._arrivals.get(timeout=wait_s)
                wait_s = 0
                if arrival is None:
                    return False
                if isinstance(arrival, Job):
                    self._waiting.add(arrival.client, len(arrival.chunk.hidden), arrival)
                    self._returns.arrive(arrival.chunk.lease, arrival.submitted_at)
                else:
                    arrival()
        except queue.Empty:
            pass
        return True

    def _gather(self) -> bool:
        """Let sessions that are due any moment join the next batch, if all that waits are decode steps.

        Returns:
            False when the worker is to stop.
        """
        started = self._clock()
        while self._waiting and _all_decode(self._waiting):
            now = self._clock()
            left_s = self._returns.wait_until(now, started + self._patience_s - now) - now
            if left_s <= 0:
                return True
            if not self._collect(left_s):
                return False
        return True

    def _next_batch(self) -> list[Job]:
        """The next jobs that fit together: one a lease, prefill bounded, and decode for each client."""
        if not self._waiting:
            return []
        batch: list[Job] = []
        taken: set[int] = set()
        room = self._max_batch_tokens
        most_steps = self._client_steps if len(self._waiting.clients()) > 1 else len(self._waiting)
        steps = Counter[str]()
        for job in self._waiting:
            tokens, lease = len(job.chunk.hidden), id(job.chunk.lease)
            if job.is_decode:
                fits = steps[job.client] < most_steps
            else:
                fits = tokens <= room or room == self._max_batch_tokens
            if fits and lease not in taken and not (batch and job.span != batch[0].span):
                batch.append(job)
                room -= 0 if job.is_decode else tokens
                steps[job.client] += job.is_decode
            taken.add(lease)
        self._waiting.take(batch)
        return batch

    def _compute(self, batch: list[Job]) -> None:
        started = self._clock()
        stale: list[Job] = []
        live: list[Job] = []
        wrong: list[tuple[Job, Exception]] = []
        for job in batch:
            if job.is_stale():
                stale.append(job)
            elif (error := _complaint(job)) is not None:
                wrong.append((job, error))
            else:
                live.append(job)
        results = self._run(live)
        ran_s = self._clock() - started
        self._wake_loop()  # a quarter of a millisecond, in which the outputs are encoded
        payloads = [_encoded(job, output) for job, (output, _) in zip(live, results, strict=True)]
        seconds = self._clock() - started
        total = sum(len(job.chunk.hidden) for job in live)
        self._count(live, total)
        calls = [
            (job, Done(output, error, started - job.submitted_at, seconds, total, payload))
            for job, (output, error), payload in zip(live, results, payloads, strict=True)
        ]
        calls += [(job, Done(None, None, started - job.submitted_at, 0.0, 0)) for job in stale]
        calls += [(job, Done(None, error, started - job.submitted_at, 0.0, 0)) for job, error in wrong]
        try:
            if self._on_step is not None and _is_one_step(results):
                self._token.run_sync_soon(self._on_step, live[0].span, ran_s)
            self._token.run_sync_soon(_deliver, calls)
        except trio.RunFinishedError:
            logger.debug("the event loop ended before %s results", len(calls))
        # While the event loop wakes up:
        self._let_go(live, started + seconds)
        if _all_decode(live):
            self._patience_s = PATIENCE * seconds

    def _wake_loop(self) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(_nothing, idempotent=True)

    def _count(self, jobs: list[Job], tokens: int) -> None:
        if jobs:
            self._counts.add("batches")
            self._counts.add("steps", by=len(jobs))
            self._counts.add("tokens", by=tokens)

    def _let_go(self, jobs: list[Job], now: float) -> None:
        """Note who is to come back; who prefills, or has more steps here already, is not waited for."""
        here = {id(job.chunk.lease) for job in self._waiting}
        for job in jobs:
            if job.is_decode and id(job.chunk.lease) not in here:
                self._returns.leave(job.chunk.lease, now)
            else:
                self._returns.forget(job.chunk.lease)

    def _run(self, jobs: list[Job]) -> list[tuple[Tensor | None, Exception | None]]:
        """Each job's output or error. A batch that fails is run job by job: only the guilty one fails."""
        if not jobs:
            return []
        try:
            outputs = self._runner.run([job.chunk for job in jobs], jobs[0].span)
            return [(output, None) for output in outputs]
        except Exception as exc:  # whatever went wrong, the session must hear of it and the thread go on
            if len(jobs) > 1:
                return [result for job in jobs for result in self._run([job])]
            logger.exception("a step of %s tokens failed", len(jobs[0].chunk.hidden))
            return [(None, exc)]


def _complaint(job: Job) -> Exception | None:
    """What the job's own check has against it."""
    try:
        if job.check is not None:
            job.check()
    except P2PInferError as exc:
        return exc
    return None


def _encoded(job: Job, output: Tensor | None) -> bytes:
    return b"" if output is None or job.encode is None else job.encode(output)


def _is_one_step(results: Sequence[tuple[Tensor | None, Exception | None]]) -> bool:
    """Whether a batch was one token of one session, and came out."""
    return len(results) == 1 and (output := results[0][0]) is not None and len(output) == 1


def _all_decode(jobs: Iterable[Job]) -> bool:
    return all(job.is_decode for job in jobs)


def _nothing() -> None: ...


def _deliver(calls: list[tuple[Job, Done]]) -> None:
    for job, done in calls:
        job.on_done(done)


@asynccontextmanager
async def open_worker(
    runner: Runner,
    max_batch_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    client_steps: int = 32,
    counts: Counts | None = None,
    on_step: Callable[[BlockSpan, float], None] | None = None,
) -> AsyncGenerator[Worker]:
    """A running worker; on exit it finishes the batch at hand and its thread ends.

    Args:
        on_step: Called in the event loop with the blocks and the seconds of every step of one token that had
            the device to itself.
    """
    worker = Worker(
        runner, max_batch_tokens, clock, client_steps=client_steps, counts=counts, on_step=on_step
    )
    worker.start()
    try:
        yield worker
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(worker.stop().join)
