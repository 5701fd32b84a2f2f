"""A session in a task of its own: it outlives the call that opened it, and its bugs harm no other session."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import trio

from .session import Session

logger = logging.getLogger(__name__)


async def start_session(
    nursery: trio.Nursery,
    opening: AbstractAsyncContextManager[Session],
    *,
    on_closed: Callable[[Session], None] = lambda _: None,
) -> Session:
    """Enter `opening`, an `open_session(...)`, in a task of `nursery`, until `Session.aclose`.

    An error in one of the session's tasks that is no peer's ends this session alone: it is logged, and raised
    by whoever waits for a result.

    Args:
        on_closed: Called once, when the session has ended.

    Raises:
        PeerError: It could not be opened.
    """
    session: Session = await nursery.start(partial(_host_session, opening, on_closed))
    return session


async def _host_session(
    opening: AbstractAsyncContextManager[Session],
    on_closed: Callable[[Session], None],
    *,
    task_status: trio.TaskStatus[Session],
) -> None:
    session: Session | None = None
    bug: Exception | None = None
    try:
        async with opening as session:
            task_status.started(session)
            await session.until_closing()
    except Exception as exc:
        if session is None:
            raise  # nothing was opened: it is the caller's
        logger.exception("a session ends for an error of our own")
        bug = exc
    finally:
        if session is not None:
            session.note_ended(bug)
            on_closed(session)
