"""A nursery for background tasks of something that is itself used in an `async with`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_nursery() -> AsyncGenerator[trio.Nursery]:
    """A nursery that is cancelled when its body ends, and whose body's lone error comes out bare.

    trio wraps whatever leaves a nursery in an ExceptionGroup, even when only the body failed. Users of a
    context manager neither see nor want to know the nursery inside it.
    """
    body_error: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as exc:
                body_error = exc
                raise
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if body_error is not None and _only(group) is body_error:
            raise body_error from body_error.__cause__
        raise


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The single exception in a group of one, however deep; else the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
