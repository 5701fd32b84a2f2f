"""Whose work shares a batch, and what a batch waits for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
import trio
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.serve.worker import BatchReport, open_worker
from p2pinfer.node.transport.counters import Counts

from .jobs import Lease, Recorder, Results, held_up


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
