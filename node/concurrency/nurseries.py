"""Nurseries inside context managers, whose users see no exception groups; the reason inside a group."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar, cast

import trio

_Entered = TypeVar("_Entered")


@contextmanager
def bare_errors() -> Generator[None]:
    """Let a lone error out of its ExceptionGroups.

    trio wraps whatever leaves a nursery, also when only the body of one has failed. Whoever uses a context
    manager that has nurseries inside, ours or libp2p's, neither sees nor wants to know them.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        error = _only(group)
        if error is group:
            raise
        raise error from error.__cause__


@asynccontextmanager
async def open_nursery() -> AsyncGenerator[trio.Nursery]:
    """A nursery that is cancelled when its body ends, and lets a lone error out bare."""
    with bare_errors():
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def outlasting(manager: AbstractAsyncContextManager[_Entered]) -> AsyncGenerator[_Entered]:
    """Enter `manager`, and leave it when the block has ended, also when that was cancelled.

    A cancellation from outside reaches every task below it at once: the network would hang up while the
    block, in its last words, still says goodbye. So `manager` is held by a task that only the block's end
    ends. While it is being entered, a cancellation works as ever.
    """
    ended = trio.Event()
    async with open_nursery() as nursery:
        try:
            yield await nursery.start(partial(_hold, manager, ended))
        finally:
            ended.set()


async def _hold(
    manager: AbstractAsyncContextManager[_Entered],
    ended: trio.Event,
    *,
    task_status: trio.TaskStatus[_Entered],
) -> None:
    with trio.CancelScope() as scope:
        async with manager as entered:
            scope.shield = True
            task_status.started(entered)
            await ended.wait()


def innermost(exc: BaseException) -> str:
    """The reason at the bottom, which libp2p and trio wrap up to four times."""
    if exc.__cause__ is not None:
        return innermost(exc.__cause__)
    if isinstance(exc, ExceptionGroup):
        return innermost(cast("ExceptionGroup[Exception]", exc).exceptions[0])
    return str(exc) or type(exc).__name__


def _only(error: BaseException) -> BaseException:
    """The single exception in a group of one, however deep; else the error itself."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    group = cast("BaseExceptionGroup[BaseException]", error)
    return _only(group.exceptions[0]) if len(group.exceptions) == 1 else group
