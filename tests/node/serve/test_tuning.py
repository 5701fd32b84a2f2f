"""Threads are found by trying; a runner whose steps take what the test says stands for a busy computer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.serve import tuning
from p2pinfer.node.serve.decode_speed import DecodeSpeed
from p2pinfer.node.serve.tuning import REMEASURE_S, Tuner, candidates, find_threads, quickest
from p2pinfer.node.serve.worker import open_worker

from ..memory_swarm import FLOAT32

SPAN = BlockSpan(0, 1)


@pytest.mark.parametrize(
    ("cores", "numbers"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_numbers_of_threads_to_try(cores: int, numbers: list[int]) -> None:
    assert candidates(cores) == numbers


def test_a_change_must_be_worth_it() -> None:
    assert quickest({1: 0.95, 2: 1.0}, 2) == 2
    assert quickest({1: 0.5, 2: 1.0}, 2) == 1
    assert quickest({1: 1.0, 2: 0.5, 4: 3.0}, 1) == 2


@pytest.fixture
def runner(checkpoint: Checkpoint) -> SpanRunner:
    return open_runner(checkpoint, SPAN, FLOAT32)


@pytest.mark.parametrize(
    ("busy", "best", "tried"),
    [
        ({8: 0.05, 4: 0.02, 2: 0.009, 1: 0.007}, 1, [8, 4, 2, 1]),  # something else is going on
        ({8: 0.001, 4: 0.0016, 2: 0.003, 1: 0.006}, 8, [8, 4]),  # nothing is: the rest is not tried
        ({8: 0.0075, 4: 0.007, 2: 0.0072, 1: 0.0071}, 8, [8, 4, 2, 1]),  # all the same
    ],
)
def test_the_quickest_number_is_found(
    runner: SpanRunner, monkeypatch: pytest.MonkeyPatch, busy: dict[int, float], best: int, tried: list[int]
) -> None:
    seen: list[int] = []

    def time_steps(timed: SpanRunner) -> list[float]:
        seen.append(timed.threads)
        return [busy[timed.threads], 100.0, busy[timed.threads]]

    monkeypatch.setattr(tuning, "time_steps", time_steps)
    threads, tokens_per_s = find_threads(runner, 8)
    assert threads == best
    assert tokens_per_s == pytest.approx(1 / busy[best])
    assert runner.threads == best
    assert seen == tried


def test_on_this_machine_it_comes_to_a_number_and_leaves_the_cache_as_it_was(runner: SpanRunner) -> None:
    before = torch.get_num_threads()
    threads, tokens_per_s = find_threads(runner, 2)
    torch.set_num_threads(before)
    assert threads in (1, 2)
    assert tokens_per_s > 1
    assert runner.cache.free_tokens == runner.cache.capacity_tokens


class Computer:
    """A runner whose steps take as long as the number of threads says, on a clock of its own."""

    def __init__(self, runner: SpanRunner, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.ran: list[int] = []
        self._real = runner
        runner.run = self.run  # type: ignore[method-assign]

    def run(self, chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        self.now += self.seconds[self._real.threads]
        self.ran.append(self._real.threads)
        return [chunk.hidden for chunk in chunks]


class Tuned:
    """A tuner over such a computer, and whether somebody is being served."""

    def __init__(self, computer: Computer, speed: DecodeSpeed) -> None:
        self.computer = computer
        self.speed = speed
        self.sessions = 0
        self.changes = 0
        self.leases: list[CacheLease] = []

    def is_idle(self) -> bool:
        return not self.sessions

    def changed(self) -> None:
        self.changes += 1


@asynccontextmanager
async def open_tuner(
    runner: SpanRunner, seconds: dict[int, float], *, threads: int, cores: int, start: float
) -> AsyncGenerator[tuple[Tuner, Tuned]]:
    computer, speed = Computer(runner, seconds), DecodeSpeed(start)
    runner.set_threads(threads)
    tuned = Tuned(computer, speed)
    async with open_worker(64, lambda: computer.now) as worker:
        tuner = Tuner(runner, worker, speed, tuned.is_idle, threads=threads, cores=cores)
        yield tuner, tuned


async def test_a_node_that_has_become_slow_tries_other_numbers(runner: SpanRunner) -> None:
    async with open_tuner(runner, {1: 0.007, 2: 0.05}, threads=2, cores=2, start=150.0) as (tuner, tuned):
        await tuner.look()
    assert runner.threads == 1
    assert tuned.speed.tokens_per_s == pytest.approx(1 / 0.007)
    assert runner.cache.free_tokens == runner.cache.capacity_tokens


async def test_a_number_that_was_asked_for_stays_and_is_measured(runner: SpanRunner) -> None:
    async with open_tuner(runner, {1: 0.007, 3: 0.05}, threads=3, cores=1, start=150.0) as (tuner, tuned):
        await tuner.look()
    assert set(tuned.computer.ran) == {3}
    assert tuned.speed.tokens_per_s == pytest.approx(20)


async def test_who_comes_meanwhile_finds_everything_as_it_was(runner: SpanRunner) -> None:
    async with open_tuner(runner, {1: 0.007, 2: 0.05}, threads=2, cores=2, start=150.0) as (tuner, tuned):
        tuned.sessions = 1
        await tuner.look()
        assert tuned.computer.ran == []
    assert runner.threads == 2
    assert tuned.speed.tokens_per_s == 150.0
    assert runner.cache.free_tokens == runner.cache.capacity_tokens


async def test_it_looks_rarely_and_only_while_nobody_is_served(
    runner: SpanRunner, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        open_tuner(runner, {1: 0.004, 2: 0.004}, threads=2, cores=2, start=250.0) as (tuner, tuned),
        trio.open_nursery() as nursery,
    ):
        tuned.sessions = 1
        nursery.start_soon(tuner.keep_right, tuned.changed)
        await trio.sleep(2 * REMEASURE_S)
        assert tuned.computer.ran == []
        assert tuned.changes > 10
        tuned.sessions = 0
        with trio.fail_after(REMEASURE_S):
            while not tuned.computer.ran:
                await trio.sleep(1)
        nursery.cancel_scope.cancel()
