from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.errors import LocalError, PeerError
from p2pinfer.node.tasks import bare_errors, open_nursery


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
