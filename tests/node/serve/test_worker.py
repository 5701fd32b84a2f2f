from __future__ import annotations

import threading
from typing import cast

import pytest
import torch
import trio

from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.serve.worker import Worker, open_worker

from .jobs import Lease, Recorder, Results, held_up


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
