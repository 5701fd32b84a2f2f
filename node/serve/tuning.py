"""Choice of the number of threads that a span is computed with, reviewed from time to time.

More threads are quicker on a computer with nothing else to do. Beside other work they are slower by far: all
wait for the one whose core is taken, a few hundred times a token. So the number is found by trying, at the
start and, while nobody is served, again. Sessions do not notice: how many threads share a product changes the
order of some sums, at most, which rounds as another machine may, and audits take that for honest
(`models/verify/noise_floor.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from statistics import median
from typing import Final

import torch
import trio

from p2pinfer.errors import CacheFull
from p2pinfer.models.compute.runner import Chunk, SpanRunner
from p2pinfer.models.span import BlockSpan

from .capacity import time_steps
from .decode_speed import DecodeSpeed
from .forward import ForwardPass
from .worker import BatchReport, Worker

logger = logging.getLogger(__name__)

LOOK_S: Final = 30.0  # between looks at whether something has changed
REMEASURE_S: Final = 600.0  # between looks where nothing seems to have changed
STEPS: Final = 9  # of a measurement, the first of which is thrown away
SLOWER: Final = 0.7  # of the speed at the last look: then it is looked again
GAIN: Final = 1.1  # a change of the number of threads must be worth that much
HOPELESS: Final = 1.5  # so much slower than the best, and still fewer threads will not do


def candidates(cores: int) -> list[int]:
    """Numbers of threads to try: 1, 2, 4, ... and all of them."""
    numbers = [1 << power for power in range(cores.bit_length()) if 1 << power < cores]
    return [*numbers, cores]


def find_threads(runner: SpanRunner, cores: int) -> tuple[int, float]:
    """Set the runner to the number of threads that decodes quickest; the number, and its tokens per second.

    From the most downwards, while that gains. For the thread that the runner belongs to.

    Raises:
        CacheFull: The cache has no room for the few steps that this takes.
    """
    seconds: dict[int, float] = {}
    for number in reversed(candidates(cores)):
        runner.set_threads(number)
        seconds[number] = max(median(time_steps(runner)), 1e-9)
        if seconds[number] > HOPELESS * min(seconds.values()):
            break
    best = quickest(seconds, cores)
    runner.set_threads(best)
    return best, 1 / seconds[best]


def quickest(seconds: Mapping[int, float], current: int) -> int:
    """The number of threads whose steps are shortest; the current one unless another is worth a change."""
    best = min(seconds, key=lambda number: seconds[number])
    return best if seconds[best] * GAIN < seconds[current] else current


class _TimedStep(ForwardPass):
    """A step that only its duration is wanted of."""

    def __init__(
        self, runner: SpanRunner, span: BlockSpan | None, chunk: Chunk, client: str, submitted_at: float
    ) -> None:
        super().__init__(runner, span, chunk, client, submitted_at)
        self.delivered = trio.Event()
        self.seconds = 0.0

    def deliver(self, report: BatchReport) -> None:
        self.seconds = report.compute_s
        self.delivered.set()


class Tuner:
    """Looks after the speed and the threads of a span that is served, in moments when nobody uses it."""

    def __init__(
        self,
        runner: SpanRunner,
        worker: Worker,
        speed: DecodeSpeed,
        is_idle: Callable[[], bool],
        *,
        threads: int,
        cores: int,
    ) -> None:
        """A tuner; with one core, or a number of threads that was asked for, it only measures."""
        self._runner = runner
        self._worker = worker
        self._speed = speed
        self._is_idle = is_idle
        self._threads = threads
        self._numbers = sorted({threads, *candidates(cores)}) if cores > 1 else [threads]
        self._reference = speed.tokens_per_s
        self._looked_at = trio.current_time()

    async def keep_right(self, changed: Callable[[], None]) -> None:
        """Look again and again; `changed` is called when the speed may have."""
        while True:
            await trio.sleep(LOOK_S)
            slower = self._speed.tokens_per_s < SLOWER * self._reference
            due = trio.current_time() - self._looked_at >= REMEASURE_S
            if (slower or due) and self._is_idle():
                with suppress(CacheFull):
                    await self.look()
            changed()

    async def look(self) -> None:
        """Measure with every number of threads, and go on with the quickest.

        It ends as soon as somebody opens a session, with everything as it was.
        """
        measured: dict[int, list[float]] = {}
        for number in self._numbers:
            seconds = await self._measure(number)
            if seconds is None:
                return
            measured[number] = seconds
        best = quickest({number: median(taken) for number, taken in measured.items()}, self._threads)
        if best != self._threads:
            logger.info("computing with %d threads instead of %d", best, self._threads)
        self._threads = best
        self._set_threads(best)
        self._speed.restart(measured[best], trio.current_time())
        self._reference = self._speed.tokens_per_s
        self._looked_at = trio.current_time()

    async def _measure(self, threads: int) -> list[float] | None:
        """The seconds of some steps with so many threads; None if somebody came."""
        self._set_threads(threads)
        lease = self._runner.cache.reserve(STEPS)
        seconds: list[float] = []
        try:
            for position in range(STEPS):
                if not self._is_idle():
                    self._set_threads(self._threads)
                    return None
                seconds.append(await self._step(Chunk(lease, position, torch.zeros(1, self._width))))
        finally:
            self._worker.release(lease)
        return [max(each, 1e-9) for each in seconds[1:]]

    async def _step(self, chunk: Chunk) -> float:
        step = _TimedStep(self._runner, None, chunk, "", self._worker.now)
        self._worker.submit(step)
        await step.delivered.wait()
        return step.seconds

    @property
    def _width(self) -> int:
        return self._runner.spec.hidden_size

    def _set_threads(self, threads: int) -> None:
        self._worker.call(lambda: self._runner.set_threads(threads))
