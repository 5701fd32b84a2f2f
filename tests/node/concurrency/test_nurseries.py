from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from p2pinfer.errors import LocalError, PeerError
from p2pinfer.node.concurrency.nurseries import bare_errors, open_nursery, outlasting


def test_a_lone_error_comes_out_bare_however_deep_it_lay() -> None:
    cause = ValueError("cause")
    error = LocalError("full")
    error.__cause__ = cause
    with pytest.raises(LocalError, match="full") as caught, bare_errors():
        raise BaseExceptionGroup("outer", [ExceptionGroup("inner", [error])])
    assert caught.value is error
    assert caught.value.__cause__ is cause


def test_several_errors_stay_together() -> None:
    with pytest.raises(ExceptionGroup) as caught, bare_errors():
        raise ExceptionGroup("two", [LocalError("a"), PeerError("b")])
    assert len(caught.value.exceptions) == 2


def test_what_is_no_group_is_let_through() -> None:
    with pytest.raises(LocalError), bare_errors():
        raise LocalError("full")
    with bare_errors():
        pass


async def test_tasks_end_with_the_body() -> None:
    ended = trio.Event()

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
    assert ended.is_set()


async def test_the_body_s_error_comes_out_bare_and_ends_the_tasks() -> None:
    with pytest.raises(LocalError):
        async with open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise LocalError("full")


async def test_a_task_s_error_comes_out_bare_and_ends_the_body() -> None:
    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise LocalError("full")

    with pytest.raises(LocalError):
        async with open_nursery() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()


async def test_a_cancellation_from_outside_passes_through() -> None:
    with trio.move_on_after(0) as scope:
        async with open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.sleep_forever()
    assert scope.cancelled_caught


class Held:
    """Something with a task in it, that notes what happens to it."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[str]:
        async with open_nursery() as nursery:
            nursery.start_soon(self._work)
            await trio.lowlevel.checkpoint()
            yield "entered"

    async def _work(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.steps.append("work ended")


async def test_what_outlasts_goes_on_while_a_cancelled_block_says_goodbye() -> None:
    held = Held()
    with trio.CancelScope() as scope:
        async with outlasting(held.open()) as entered:
            assert entered == "entered"
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked()
                held.steps.append("goodbye")
    assert scope.cancelled_caught
    assert held.steps == ["goodbye", "work ended"]


async def test_what_outlasts_ends_with_the_block_and_lets_its_error_out() -> None:
    held = Held()
    async with outlasting(held.open()):
        pass
    assert held.steps == ["work ended"]
    with pytest.raises(LocalError, match="full"):
        async with outlasting(held.open()):
            raise LocalError("full")
    assert held.steps == ["work ended"] * 2


async def test_an_error_inside_what_outlasts_ends_the_block() -> None:
    @asynccontextmanager
    async def broken() -> AsyncGenerator[None]:
        async with open_nursery() as nursery:
            nursery.start_soon(fail)
            yield

    async def fail() -> None:
        await trio.testing.wait_all_tasks_blocked()
        raise LocalError("broken")

    with pytest.raises(LocalError, match="broken"):
        async with outlasting(broken()):
            await trio.sleep_forever()


async def test_entering_can_fail_and_can_be_cancelled() -> None:
    @asynccontextmanager
    async def slow(error: Exception | None) -> AsyncGenerator[None]:
        if error is not None:
            raise error
        await trio.sleep_forever()
        yield

    with pytest.raises(LocalError, match="taken"):
        async with outlasting(slow(LocalError("taken"))):
            pytest.fail("it was not entered")
    with trio.move_on_after(0) as scope:
        async with outlasting(slow(None)):
            pytest.fail("it was not entered")
    assert scope.cancelled_caught
