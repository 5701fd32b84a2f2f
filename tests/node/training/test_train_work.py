from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, cast
from unittest.mock import Mock

import trio

from p2pinfer.errors import WrongOutput
from p2pinfer.models.learning.span_passes import SpanPasses
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.train_messages import Forward
from p2pinfer.node.protocol.train_receipt import PassDigests
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

    def _sealed(self) -> PassDigests:
        raise WrongOutput("nothing was computed", "client")


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
        session = passing(worker, slice_s)
        session.begin(Blocks(session, lambda: worker.submit(step), lambda: note("pass")))
        await done.wait()
    return order


async def test_a_decode_step_waits_for_one_slice_of_a_pass_and_not_for_all_of_it() -> None:
    assert await order_of(slice_s=0.0) == ["step", "pass"]
    assert await order_of(slice_s=60.0) == ["pass", "step"]


async def test_a_pass_that_nobody_wants_any_more_is_not_begun() -> None:
    begun: list[str] = []
    async with open_worker(512) as worker:
        session = passing(worker, 0.0)
        work = Blocks(session, lambda: begun.append("pass"), lambda: None)
        work.is_wanted = False
        session.begin(work)
        await worker.released()
    assert not begun


async def begin_three(worker: Worker, sessions: Sequence[Passing]) -> list[str]:
    """How three passes of each session begin and end, in slices of one block."""
    told: list[str] = []
    done = trio.Event()

    def note(what: str) -> None:
        told.append(what)
        if len(told) == 6 * len(sessions):
            done.set()

    gate = threading.Event()
    worker.call(partial(_wait_for, gate))  # until all of them are in line
    for name, session in zip("ab", sessions, strict=False):
        for number in range(3):
            begins, ends = f"{name}{number} begins", f"{name}{number} ends"
            session.begin(Blocks(session, partial(note, begins), partial(note, ends)))
    gate.set()
    await done.wait()
    return told


async def test_passes_of_a_session_are_done_one_after_the_other() -> None:
    """The first one's answer is on its way to the next hop while the second one is computed."""
    async with open_worker(512) as worker:
        told = await begin_three(worker, [passing(worker, 0.0)])
    assert told == [f"a{number} {what}" for number in range(3) for what in ("begins", "ends")]


async def test_passes_of_two_sessions_take_turns() -> None:
    async with open_worker(512) as worker:
        told = await begin_three(worker, [passing(worker, 0.0), passing(worker, 0.0)])
    assert told.index("b0 begins") < told.index("a0 ends")
    for name in "ab":
        mine = [each for each in told if each.startswith(name)]
        assert mine == [f"{name}{number} {what}" for number in range(3) for what in ("begins", "ends")]


def test_results_that_are_not_sealed_have_no_receipt() -> None:
    """Such as values that are not finite, which are found outside the worker's thread."""
    work = Blocks(cast(Passing, Mock(client="client", slice_s=60.0)), lambda: None, lambda: None)
    work.run((work,))
    assert work.is_over
    assert work.error is None
    work.seal()
    assert isinstance(work.error, WrongOutput)
    assert work.digests is None


async def test_nothing_of_a_session_is_held_after_its_end() -> None:
    """A pass has megabytes of inputs and graphs."""
    async with open_worker(512) as worker:
        session = passing(worker, 0.0)
        await begin_three(worker, [session])
        session.close()
        await worker.released()
    # The thread may have looked at its last batch until it ended; what the worker holds, it holds still.
    left = weakref.ref(session)
    del session
    gc.collect()
    assert left() is None
    assert not worker.queued


def _wait_for(gate: threading.Event) -> None:
    gate.wait()
