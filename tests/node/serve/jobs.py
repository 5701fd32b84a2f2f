"""Jobs of a worker in tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
import trio
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.serve.forward import ForwardPass
from p2pinfer.node.serve.worker import BatchReport, Worker


class Lease:
    """What the worker knows of a lease: who it is, and that it can be released."""

    def __init__(self) -> None:
        self.released_by: int | None = None

    def release(self) -> None:
        self.released_by = threading.get_ident()


class Recorder:
    """A runner that adds one, notes every batch, and waits for the gate before each."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Semaphore(0)
        self.at_work = threading.Event()

    def run(self, chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        self.at_work.set()
        self.gate.acquire()
        self.threads.add(threading.get_ident())
        self.batches.append([len(chunk.hidden) for chunk in chunks])
        if any(chunk.position < 0 for chunk in chunks):
            raise ValueError("no such position")
        return [chunk.hidden + 1 for chunk in chunks]


class Pass(ForwardPass):
    """A pass that says what became of it."""

    stale = False
    wrong = False
    note: Callable[[Pass, BatchReport], None]
    encode: Callable[[Tensor], bytes] | None = None
    sent = b""

    def is_wanted(self) -> bool:
        if self.wrong:
            self.threads.add(threading.get_ident())
            self.error = WrongOutput("not finite", "mallory")
        return not (self.stale or self.wrong)

    def finish(self) -> None:
        if self.output is not None and self.encode is not None:
            self.threads.add(threading.get_ident())
            self.sent = self.encode(self.output)

    def deliver(self, report: BatchReport) -> None:
        self.note(self, report)

    threads: set[int]


class Results:
    """Collects what becomes of passes."""

    def __init__(self, worker: Worker, runner: Recorder) -> None:
        self.done: list[tuple[str, Pass]] = []
        self.reports: list[BatchReport] = []
        self.threads: set[int] = set()
        self._worker = worker
        self._runner = runner
        self._arrived = trio.Event()

    def submit(
        self,
        name: str,
        tokens: int = 1,
        lease: Lease | None = None,
        position: int = 0,
        stale: bool = False,
        span: BlockSpan | None = None,
        submitted_at: float | None = None,
        client: str = "",
        wrong: bool = False,
        encode: Callable[[Tensor], bytes] | None = None,
    ) -> None:
        chunk = Chunk(cast(CacheLease, lease or Lease()), position, torch.zeros(tokens, 2))

        def note(done: Pass, report: BatchReport) -> None:
            self.done.append((name, done))
            self.reports.append(report)
            self._arrived.set()

        at = time.perf_counter() if submitted_at is None else submitted_at
        work = Pass(self._runner, span, chunk, client, at)
        work.stale, work.wrong, work.note, work.encode = stale, wrong, note, encode
        work.threads = self.threads
        self._worker.submit(work)

    async def wait(self, count: int) -> list[str]:
        with trio.fail_after(60):
            while len(self.done) < count:
                self._arrived = trio.Event()
                await self._arrived.wait()
        return [name for name, _ in self.done]


async def held_up(runner: Recorder, results: Results) -> None:
    """Let the worker begin a first batch of one job, so that what follows collects."""
    results.submit("first")
    await trio.to_thread.run_sync(runner.at_work.wait)
