from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.serve.forward import ForwardPass
from p2pinfer.node.serve.worker import BatchReport, Worker, open_worker
from p2pinfer.node.transport.counters import Counts


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


async def test_what_arrives_during_a_batch_becomes_the_next_one() -> None:
    runner = Recorder()
    async with open_worker(100) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        for name in "abc":
            results.submit(name)
        runner.gate.release(2)
        assert await results.wait(4) == ["first", "a", "b", "c"]
    assert runner.batches == [[1], [1, 1, 1]]
    assert len(runner.threads) == 1 and threading.get_ident() not in runner.threads
    assert all(
        torch.equal(done.output, torch.ones(1, 2)) for _, done in results.done if done.output is not None
    )
    assert [report.tokens for report in results.reports] == [1, 3, 3, 3]
    for (_, done), report in zip(results.done, results.reports, strict=True):
        assert done.submitted_at <= report.started_at
        assert 0 <= report.ran_s <= report.compute_s


async def test_jobs_of_one_session_run_in_order_one_to_a_batch() -> None:
    runner, lease = Recorder(), Lease()
    async with open_worker(100) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        for name, tokens in (("a", 2), ("b", 3), ("c", 4)):
            results.submit(name, tokens, lease)
        results.submit("other")
        runner.gate.release(4)
        names = await results.wait(5)
    assert [name for name in names if name in "abc"] == ["a", "b", "c"]
    assert runner.batches == [[1], [2, 1], [3], [4]]


async def test_prefill_is_bounded_per_batch_and_decode_rides_along() -> None:
    runner = Recorder()
    async with open_worker(64) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        for name, tokens in (("long", 60), ("longer", 40), ("one", 1), ("two", 1)):
            results.submit(name, tokens)
        runner.gate.release(3)
        await results.wait(5)
    assert runner.batches == [[1], [60, 1, 1], [40]]


async def test_only_sessions_over_the_same_blocks_share_a_batch() -> None:
    runner = Recorder()
    async with open_worker(64) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        for name, stop in (("a", 4), ("b", 3), ("c", 4)):
            results.submit(name, span=BlockSpan(0, stop))
        runner.gate.release(3)
        assert await results.wait(4) == ["first", "a", "c", "b"]
    assert runner.batches == [[1], [1, 1], [1]]


async def test_a_chunk_larger_than_a_batch_still_runs() -> None:
    runner = Recorder()
    runner.gate.release(1)
    async with open_worker(64) as worker:
        results = Results(worker, runner)
        results.submit("huge", 1000)
        assert await results.wait(1) == ["huge"]


async def test_a_stale_job_is_dropped_unread_and_reported_so() -> None:
    runner = Recorder()
    async with open_worker(64) as worker:
        results = Results(worker, runner)
        results.submit("stale", stale=True)
        assert await results.wait(1) == ["stale"]
        assert results.done[0][1].output is None and results.done[0][1].error is None
        runner.gate.release(1)
        results.submit("fresh")
        await results.wait(2)
    assert runner.batches == [[1]]


async def test_a_job_that_fails_takes_no_other_of_its_batch_along(caplog: pytest.LogCaptureFixture) -> None:
    runner = Recorder()
    async with open_worker(64) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        results.submit("bad", position=-1)
        results.submit("beside it")
        runner.gate.release(4)  # the first one, the batch of two, and each of these alone
        await results.wait(3)
        runner.gate.release(1)
        results.submit("after")
        await results.wait(4)
    errors = {name: done.error for name, done in results.done}
    assert isinstance(errors.pop("bad"), ValueError)
    assert errors == {"first": None, "beside it": None, "after": None}
    assert "a step of 1 tokens failed" in caplog.text


async def test_a_lease_is_given_back_in_the_event_loop_after_what_is_computed() -> None:
    runner, lease = Recorder(), Lease()
    async with open_worker(64) as worker:
        results = Results(worker, runner)
        results.submit("step", lease=lease)
        await trio.to_thread.run_sync(runner.at_work.wait)
        worker.release(cast(CacheLease, lease))
        assert lease.released_by is None
        runner.gate.release(1)
        await results.wait(1)
        with trio.fail_after(60):
            while lease.released_by is None:
                await trio.lowlevel.checkpoint()
    assert lease.released_by == threading.get_ident()


def test_results_after_the_event_loop_s_end_are_nobody_s() -> None:
    runner = Recorder()

    async def main() -> threading.Thread:
        worker = Worker(64)
        worker.start()
        Results(worker, runner).submit("late")
        await trio.to_thread.run_sync(runner.at_work.wait)
        return worker.stop()

    thread = trio.run(main)
    runner.gate.release(1)
    thread.join(5)
    assert not thread.is_alive()


class SlowDevice(Recorder):
    """Every batch takes a thousand seconds of a clock that nothing else moves."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def run(self, chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        outputs = super().run(chunks, span)
        self.now += 1000
        return outputs


async def walk_in_step(device: SlowDevice, results: Results, *sessions: Lease) -> None:
    """Let these share two batches, and take two hundred seconds to come back from the first."""
    for round_ in range(2):
        device.at_work.clear()
        await held_up(device, results)
        for session in sessions:
            results.submit("", lease=session, submitted_at=device.now + 200 * round_)
        device.gate.release(2)
        await results.wait(len(results.done) // 3 * 3 + 3)
    assert device.batches == [[1], [1, 1], [1], [1, 1]]


async def test_a_batch_waits_for_a_session_that_is_due_before_another_batch_would_end() -> None:
    device, here, away = SlowDevice(), Lease(), Lease()
    async with open_worker(64, clock=lambda: device.now) as worker:
        results = Results(worker, device)
        await walk_in_step(device, results, here, away)
        device.gate.release(2)
        results.submit("here", lease=here, submitted_at=device.now + 100)
        results.submit("away", lease=away, submitted_at=device.now + 300)
        await results.wait(8)
    assert device.batches[4:] == [[1, 1]]


async def test_a_batch_does_not_wait_for_a_session_that_is_overdue() -> None:
    device, here, away = SlowDevice(), Lease(), Lease()
    async with open_worker(64, clock=lambda: device.now) as worker:
        results = Results(worker, device)
        await walk_in_step(device, results, here, away)
        device.now += 5000
        device.gate.release()
        results.submit("here", lease=here, submitted_at=device.now)
        assert (await results.wait(7))[-1] == "here"


async def test_the_time_that_a_session_was_alone_does_not_count_when_others_come() -> None:
    """Nobody waits for a session that is alone, so its times are not noted, and not taken up again."""
    device, here, away = SlowDevice(), Lease(), Lease()
    async with open_worker(64, clock=lambda: device.now) as worker:
        results = Results(worker, device)

        async def step(session: Lease, after_s: float) -> None:
            device.gate.release()
            results.submit("", lease=session, submitted_at=device.now + after_s)
            await results.wait(len(results.done) + 1)

        for session in (here, away, here, away):
            await step(session, -800)  # each is back 200 s after its last step ended
        worker.release(cast(CacheLease, away))
        await worker.released()
        for _ in range(3):
            device.now += 50_000
            await step(here, 0)
        device.now += 50_000
        for session in (Lease(), here, Lease(), here):
            await step(session, -800)
        device.at_work.clear()
        results.submit("another", submitted_at=device.now)
        has_waited = not await trio.to_thread.run_sync(device.at_work.wait, 0.1)
        results.submit("here", lease=here, submitted_at=device.now + 200)
        device.gate.release(2)
        await results.wait(len(results.done) + 2)
    assert has_waited
    assert device.batches == [*[[1]] * 11, [1, 1]]


async def test_a_prompt_waits_for_nobody() -> None:
    device = SlowDevice()
    async with open_worker(64, clock=lambda: device.now) as worker:
        results = Results(worker, device)
        await walk_in_step(device, results, Lease(), Lease())
        device.gate.release()
        results.submit("prompt", 40, submitted_at=device.now)
        assert (await results.wait(7))[-1] == "prompt"


async def test_a_report_says_how_long_a_batch_ran_and_how_many_tokens_of_it() -> None:
    device = SlowDevice()
    async with open_worker(64, lambda: device.now) as worker:
        results = Results(worker, device)
        device.gate.release(6)
        for count, (name, tokens, position) in enumerate((("prompt", 40, 0), ("wrong", 1, -1)), start=1):
            results.submit(name, tokens, position=position, submitted_at=device.now)
            await results.wait(count)
        assert results.reports == [BatchReport(0.0, 1000.0, 1000.0, 40), BatchReport(1000.0, 0.0, 0.0, 1)]
        assert results.done[1][1].output is None


async def test_a_client_with_a_long_line_of_prompts_does_not_keep_another_waiting() -> None:
    runner = Recorder()
    async with open_worker(100) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        for number in range(8):
            results.submit(f"greedy {number}", tokens=100, client="greedy")
        results.submit("modest", tokens=100, client="modest")
        runner.gate.release(10)
        order = await results.wait(10)
    assert order.index("modest") <= 2


async def test_decode_steps_of_one_client_fill_no_batch_while_another_waits() -> None:
    runner, counts = Recorder(), Counts()
    async with open_worker(100, client_steps=4, counts=counts) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        for number in range(10):
            results.submit(f"greedy {number}", client="greedy")
        results.submit("modest", client="modest")
        runner.gate.release(2)
        assert "modest" in (await results.wait(6))[:6]
        runner.gate.release(10)
        await results.wait(12)
    assert runner.batches == [[1], [1] * 5, [1] * 6]  # alone again, it may fill a batch
    assert (counts.total("batches"), counts.total("steps"), counts.total("tokens")) == (3, 12, 12)


async def test_what_is_not_right_is_not_computed_and_results_are_finished_in_the_workers_thread() -> None:
    runner = Recorder()
    runner.gate.release(10)

    async with open_worker(100) as worker:
        results = Results(worker, runner)
        results.submit("wrong", wrong=True)
        results.submit("right", tokens=3, encode=lambda output: bytes(output.shape))
        await results.wait(2)
    done = dict(results.done)
    assert isinstance(done["wrong"].error, WrongOutput)
    assert done["wrong"].output is None
    assert done["right"].sent == bytes([3, 2])
    assert [3] in runner.batches
    assert results.threads == runner.threads


async def test_a_result_that_cannot_be_finished_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail(output: Tensor) -> bytes:
        raise RuntimeError("no such codec")

    runner = Recorder()
    runner.gate.release(10)
    async with open_worker(100) as worker:
        results = Results(worker, runner)
        results.submit("bad", encode=fail)
        results.submit("good", encode=lambda _: b"encoded")
        await results.wait(2)
        results.submit("after", encode=lambda _: b"encoded")
        await results.wait(3)
    done = dict(results.done)
    assert str(done["bad"].error) == "no such codec" and done["bad"].output is None
    assert done["good"].sent == done["after"].sent == b"encoded"
    assert "cannot be sent" in caplog.text


@dataclass(eq=False)
class Sum:
    """Another kind of work, which the batcher has never heard of: it adds numbers, a batch in one go."""

    number: int
    session: object = field(default_factory=object)
    client: str = "adder"
    tokens: int = 1
    is_decode: bool = True
    submitted_at: float = 0.0
    batch_key: object = "sum"
    batches: list[list[int]] = field(default_factory=list[list[int]])
    total: int = 0
    finished: bool = False
    error: Exception | None = None
    delivered: trio.Event = field(default_factory=trio.Event)

    def run(self, batch: Sequence[Sum]) -> list[Sum]:
        if any(each.number < 0 for each in batch):
            raise ValueError("a number below zero")
        wanted = [each for each in batch if each.number]
        self.batches.append([each.number for each in wanted])
        for each in wanted:
            each.total = sum(other.number for other in wanted)
        return wanted

    def fail(self, error: Exception) -> None:
        self.error = error

    def finish(self) -> None:
        self.finished = True

    def deliver(self, report: BatchReport) -> None:
        self.delivered.set()


async def test_another_kind_of_work_is_batched_among_its_own_and_beside_passes() -> None:
    """It takes its turn, shares no batch with passes, is dropped, fails alone and is delivered by itself."""
    runner, batches, session = Recorder(), list[list[int]](), object()
    sums = [Sum(number, batches=batches) for number in (1, 0, 20)]
    later = Sum(300, session, batches=batches), Sum(4000, session, batches=batches)
    async with open_worker(100) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        results.submit("a")
        for each in (*sums, *later):
            worker.submit(each)
        results.submit("b")
        runner.gate.release(2)
        await results.wait(3)
        with trio.fail_after(60):
            for each in (*sums, *later):
                await each.delivered.wait()
            bad, good = Sum(-1), Sum(7)
            for each in (bad, good):
                worker.submit(each)
            for each in (bad, good):
                await each.delivered.wait()
    assert runner.batches == [[1], [1, 1]]
    assert batches == [[1, 20, 300], [4000]]
    assert [each.total for each in (*sums, *later)] == [321, 0, 321, 321, 4000]
    assert [each.finished for each in sums] == [True, False, True]
    assert isinstance(bad.error, ValueError) and (good.error, good.total) == (None, 7)


async def test_what_waits_is_told() -> None:
    runner = Recorder()
    async with open_worker(100) as worker:
        results = Results(worker, runner)
        await held_up(runner, results)
        assert worker.queued == 0
        for number in range(3):
            results.submit(str(number))
        assert worker.queued == 3
        runner.gate.release(10)
        await results.wait(4)
