"""Nurseries inside context managers, without their users noticing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

import trio


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


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The single exception in a group of one, however deep; else the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
