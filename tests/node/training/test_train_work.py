from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import trio

from p2pinfer.models.learning.span_passes import SpanPasses
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.train_messages import Forward
from p2pinfer.node.serve.worker import BatchReport, Worker, open_worker
from p2pinfer.node.training.train_work import Passing, PassWork


class Blocks(PassWork):
    """A pass of three blocks, in whose first one somebody else's step arrives."""

    def __init__(self, passing: Passing, arrive: Callable[[], None], on_end: Callable[[], None]) -> None:
        super().__init__(passing, Forward(0, 0, 3, (30,)), bytearray(), None, on_end)
        self.arrive = arrive

    @property
    def tokens(self) -> int:
        return 10

    def _run(self) -> Generator[None, None, None]:
        self.arrive()
        yield
        yield
        yield


class Step:
    """A decode step."""

    session = "other"
    client = "other"
    batch_key = "steps"
    tokens = 1
    is_decode = True
    submitted_at = 0.0

    def __init__(self, note: Callable[[], None]) -> None:
        self.note = note

    def run(self, batch: Sequence[Any]) -> Sequence[Step]:
        return (self,)

    def fail(self, error: Exception) -> None:
        raise error

    def finish(self) -> None:
        return

    def deliver(self, report: BatchReport) -> None:
        self.note()


def passing(worker: Worker, slice_s: float) -> Passing:
    return Passing(
        cast(SpanPasses, None), BlockSpan(0, 3), "float32", "client", worker, slice_s, lambda: None
    )


async def order_of(slice_s: float) -> list[str]:
    order: list[str] = []
    done = trio.Event()

    def note(name: str) -> None:
        order.append(name)
        if len(order) == 2:
            done.set()

    async with open_worker(512) as worker:
        step = Step(lambda: note("step"))
        worker.submit(Blocks(passing(worker, slice_s), lambda: worker.submit(step), lambda: note("pass")))
        await done.wait()
    return order


async def test_a_decode_step_waits_for_one_slice_of_a_pass_and_not_for_all_of_it() -> None:
    assert await order_of(slice_s=0.0) == ["step", "pass"]
    assert await order_of(slice_s=60.0) == ["pass", "step"]


async def test_a_pass_that_nobody_wants_any_more_is_not_begun() -> None:
    begun: list[str] = []
    async with open_worker(512) as worker:
        work = Blocks(passing(worker, 0.0), lambda: begun.append("pass"), lambda: None)
        work.is_wanted = False
        worker.submit(work)
        await worker.released()
    assert not begun
