from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.serve.worker import Done, Job, Worker, open_worker
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


class Results:
    """Collects what becomes of jobs."""

    def __init__(self, worker: Worker) -> None:
        self.done: list[tuple[str, Done]] = []
        self._worker = worker
        self._arrived = trio.Event()

    def submit(
        self,
        name: str,
        tokens: int = 1,
        lease: Lease | None = None,
        position: int = 0,
        stale: bool = False,
        span: BlockSpan = BlockSpan(0, 4),
        submitted_at: float | None = None,
        client: str = "",
        check: Callable[[], None] | None = None,
        encode: Callable[[Tensor], bytes] | None = None,
    ) -> None:
        chunk = Chunk(cast(CacheLease, lease or Lease()), position, torch.zeros(tokens, 2))

        def note(done: Done) -> None:
            self.done.append((name, done))
            self._arrived.set()

        at = time.perf_counter() if submitted_at is None else submitted_at
        self._worker.submit(Job(chunk, span, lambda: stale, note, at, client, check, encode))

    async def wait(self, count: int) -> list[str]:
        with trio.fail_after(5):
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
    async with open_worker(runner, 100) as worker:
        results = Results(worker)
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
    assert [done.batch_tokens for _, done in results.done] == [1, 3, 3, 3]
    assert all(done.queue_s >= 0 and done.compute_s >= 0 for _, done in results.done)


async def test_jobs_of_one_session_run_in_order_one_to_a_batch() -> None:
    runner, lease = Recorder(), Lease()
    async with open_worker(runner, 100) as worker:
        results = Results(worker)
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
    async with open_worker(runner, 64) as worker:
        results = Results(worker)
        await held_up(runner, results)
        for name, tokens in (("long", 60), ("longer", 40), ("one", 1), ("two", 1)):
            results.submit(name, tokens)
        runner.gate.release(3)
        await results.wait(5)
    assert runner.batches == [[1], [60, 1, 1], [40]]


async def test_only_sessions_over_the_same_blocks_share_a_batch() -> None:
    runner = Recorder()
    async with open_worker(runner, 64) as worker:
        results = Results(worker)
        await held_up(runner, results)
        for name, stop in (("a", 4), ("b", 3), ("c", 4)):
            results.submit(name, span=BlockSpan(0, stop))
        runner.gate.release(3)
        assert await results.wait(4) == ["first", "a", "c", "b"]
    assert runner.batches == [[1], [1, 1], [1]]


async def test_a_chunk_larger_than_a_batch_still_runs() -> None:
    runner = Recorder()
    runner.gate.release(1)
    async with open_worker(runner, 64) as worker:
        results = Results(worker)
        results.submit("huge", 1000)
        assert await results.wait(1) == ["huge"]


async def test_a_stale_job_is_dropped_unread_and_reported_so() -> None:
    runner = Recorder()
    async with open_worker(runner, 64) as worker:
        results = Results(worker)
        results.submit("stale", stale=True)
        assert await results.wait(1) == ["stale"]
        assert results.done[0][1].output is None and results.done[0][1].error is None
        runner.gate.release(1)
        results.submit("fresh")
        await results.wait(2)
    assert runner.batches == [[1]]


async def test_a_job_that_fails_takes_no_other_of_its_batch_along(caplog: pytest.LogCaptureFixture) -> None:
    runner = Recorder()
    async with open_worker(runner, 64) as worker:
        results = Results(worker)
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
    async with open_worker(runner, 64) as worker:
        results = Results(worker)
        results.submit("step", lease=lease)
        await trio.to_thread.run_sync(runner.at_work.wait)
        worker.release(cast(CacheLease, lease))
        assert lease.released_by is None
        runner.gate.release(1)
        await results.wait(1)
        with trio.fail_after(5):
            while lease.released_by is None:
                await trio.lowlevel.checkpoint()
    assert lease.released_by == threading.get_ident()


def test_results_after_the_event_loop_s_end_are_nobody_s() -> None:
    runner = Recorder()

    async def main() -> threading.Thread:
        worker = Worker(runner, 64)
        worker.start()
        Results(worker).submit("late")
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
    async with open_worker(device, 64, clock=lambda: device.now) as worker:
        results = Results(worker)
        await walk_in_step(device, results, here, away)
        device.gate.release(2)
        results.submit("here", lease=here, submitted_at=device.now + 100)
        results.submit("away", lease=away, submitted_at=device.now + 300)
        await results.wait(8)
    assert device.batches[4:] == [[1, 1]]


async def test_a_batch_does_not_wait_for_a_session_that_is_overdue() -> None:
    device, here, away = SlowDevice(), Lease(), Lease()
    async with open_worker(device, 64, clock=lambda: device.now) as worker:
        results = Results(worker)
        await walk_in_step(device, results, here, away)
        device.now += 5000
        device.gate.release()
        results.submit("here", lease=here, submitted_at=device.now)
        assert (await results.wait(7))[-1] == "here"


async def test_a_prompt_waits_for_nobody() -> None:
    device = SlowDevice()
    async with open_worker(device, 64, clock=lambda: device.now) as worker:
        results = Results(worker)
        await walk_in_step(device, results, Lease(), Lease())
        device.gate.release()
        results.submit("prompt", 40, submitted_at=device.now)
        assert (await results.wait(7))[-1] == "prompt"


async def test_a_step_that_had_the_device_to_itself_is_told_with_what_it_took() -> None:
    """Not a prompt, not one that failed, not several at once."""
    device = SlowDevice()
    told: list[tuple[BlockSpan, float]] = []

    def note(span: BlockSpan, seconds: float) -> None:
        told.append((span, seconds))

    async with open_worker(device, 64, lambda: device.now, on_step=note) as worker:
        results = Results(worker)
        device.gate.release(6)
        for count, (name, tokens, position) in enumerate((("prompt", 40, 0), ("wrong", 1, -1)), start=1):
            results.submit(name, tokens, position=position, submitted_at=device.now)
            await results.wait(count)
        assert told == []
        results.submit("step", span=BlockSpan(1, 3), submitted_at=device.now)
        await results.wait(3)
        assert told == [(BlockSpan(1, 3), 1000.0)]
    device, before = SlowDevice(), len(told)
    async with open_worker(device, 64, lambda: device.now, on_step=note) as worker:
        results = Results(worker)
        await walk_in_step(device, results, Lease(), Lease())
    assert len(told) - before == 2, "of four batches, two of which were of two sessions"


async def test_a_client_with_a_long_line_of_prompts_does_not_keep_another_waiting() -> None:
    runner = Recorder()
    async with open_worker(runner, 100) as worker:
        results = Results(worker)
        await held_up(runner, results)
        for number in range(8):
            results.submit(f"greedy {number}", tokens=100, client="greedy")
        results.submit("modest", tokens=100, client="modest")
        runner.gate.release(10)
        order = await results.wait(10)
    assert order.index("modest") <= 2


async def test_decode_steps_of_one_client_fill_no_batch_while_another_waits() -> None:
    runner, counts = Recorder(), Counts()
    async with open_worker(runner, 100, client_steps=4, counts=counts) as worker:
        results = Results(worker)
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


async def test_a_jobs_own_check_keeps_it_from_being_computed_and_its_output_is_encoded_here() -> None:
    runner = Recorder()
    runner.gate.release(10)
    threads: set[int] = set()

    def complain() -> None:
        threads.add(threading.get_ident())
        raise WrongOutput("not finite", "mallory")

    def encode(output: Tensor) -> bytes:
        threads.add(threading.get_ident())
        return bytes(output.shape)

    async with open_worker(runner, 100) as worker:
        results = Results(worker)
        results.submit("wrong", check=complain)
        results.submit("right", tokens=3, check=lambda: None, encode=encode)
        await results.wait(2)
    done = dict(results.done)
    assert isinstance(done["wrong"].error, WrongOutput)
    assert done["wrong"].output is None
    assert done["right"].payload == bytes([3, 2])
    assert [3] in runner.batches
    assert threads == runner.threads


async def test_what_waits_is_told() -> None:
    runner = Recorder()
    async with open_worker(runner, 100) as worker:
        results = Results(worker)
        await held_up(runner, results)
        assert worker.queued == 0
        for number in range(3):
            results.submit(str(number))
        assert worker.queued == 3
        runner.gate.release(10)
        await results.wait(4)
