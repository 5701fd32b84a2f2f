"""Opening of sessions, each with a nursery of its own: a bug in one of its tasks ends it, and no other.

`open_session` is for a block of code; `start_session` runs one in a task, so that it outlives the call.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio

from p2pinfer.client_config import SessionConfig
from p2pinfer.events import Report
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.numerics import Codec
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.node.protocol.messages import Prefix
from p2pinfer.routing.route import Route

from .chain import ReplaySource
from .failover import IsUnwanted, Replanner
from .receipt_checks import OnJoined, ReceiptBook
from .session import Session
from .terms import SessionAdapter, SessionTerms

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_session(
    host: Network,
    route: Route,
    spec: ModelSpec,
    *,
    max_tokens: int,
    codec: Codec,
    config: SessionConfig,
    replay_source: ReplaySource | None = None,
    replanner: Replanner | None = None,
    excluded: frozenset[str] = frozenset(),
    check_receipts: bool = True,
    keep_steps: bool = False,
    on_joined: OnJoined | None = None,
    is_unwanted: IsUnwanted = lambda _: False,
    report: Report | None = None,
    adapter: SessionAdapter | None = None,
    prefix: Prefix | None = None,
    draw: Draw | None = None,
    packed: int = 0,
) -> AsyncGenerator[Session]:
    """Open a session on every hop of `route` at once; leaving the block ends it on all of them.

    Args:
        max_tokens: How many positions every hop is to reserve.
        replay_source: What went in at past positions, called in a thread; lets the first hop be replaced.
        replanner: Whom to ask for others when a hop fails; None lets the session end with it.
        excluded: Peers that are not to be among those others.
        check_receipts: Demand a receipt from every hop for every step.
        keep_steps: Remember what went through, in `book.kept`, for an audit after the session.
        on_joined: Called with hops that replaced others; if it says so, what goes through from then on is
            remembered as well.
        is_unwanted: Asked about every hop from time to time, by its peer id; if it says so the session ends.
        report: Called with the session's events.
        adapter: Brought to every hop, whose receipts then name it.
        prefix: What the session begins with, of one that ended on these hops; `chain.prefix` says how much of
            it all of them still have.
        draw: How the last hop draws tokens, whose ids then travel instead of hidden states.
        packed: Positions below this one travel packed, which every hop has to have announced that it takes.

    Raises:
        PeerError: A hop could not be reached or refused; nothing stays open.
    """
    terms = SessionTerms(secrets.token_bytes(16), spec, codec, max_tokens, adapter, draw, packed)
    book: ReceiptBook | None = None
    if check_receipts:
        book = ReceiptBook(
            terms.session,
            terms.revision,
            codec,
            host.verify,
            keep=keep_steps,
            on_joined=on_joined,
            draw=draw,
            packed=packed,
        )
    async with open_nursery() as nursery:
        session = Session(
            host,
            nursery,
            terms,
            config,
            replay_source=replay_source,
            replanner=replanner,
            excluded=excluded,
            is_unwanted=is_unwanted,
            book=book,
            report=report,
        )
        await session.chain.open(route, prefix)
        session.reporter.started(session.chain.hops, max_tokens)
        try:
            nursery.start_soon(session.repair.keep_repaired)
            nursery.start_soon(session.keep_watch)
            nursery.start_soon(session.leave_relays)
            if book is not None:
                nursery.start_soon(session.watch_receipts)
            yield session
        finally:
            await session.end()


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
