"""One prefill for several texts that begin with the same prompt.

    prompt ──> a session that computes it, and ends ──> hops keep its cache
                                                         ├──> text 1
                                                         ├──> text 2    each in a session behind it
                                                         └──> text 3

Whoever is first has the prompt computed, the others wait for that. Where hops keep nothing, or a hop fails
meanwhile, each text computes its prompt for itself: it costs time, and no text.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from p2pinfer.errors import NoRoute, PeerError
from p2pinfer.session.session import Session

from .ends import Ends
from .kept_texts import KeptTexts, kept_s

logger = logging.getLogger(__name__)


class SharedPrefill:
    """Prefill that several texts of one client share."""

    def __init__(self) -> None:
        self._turn = trio.Lock()
        self._is_done = False

    async def once(self, compute: Callable[[], Awaitable[None]]) -> None:
        """Have it computed, by the first who asks; returns when it is over, however that went."""
        async with self._turn:
            if not self._is_done:
                self._is_done = True
                await compute()


async def keep_beginning(
    ids: Sequence[int], ends: Ends, open_session: Callable[[], Awaitable[Session]], texts: KeptTexts
) -> None:
    """Have hops compute some tokens and keep that, and note it among `texts`; quiet if they do not."""
    try:
        session = await open_session()
    except (PeerError, NoRoute) as exc:
        logger.debug("prefill.not_shared why=%s", exc)
        return
    keep = False
    try:
        if kept_s(session) > 0:
            embedded = await trio.to_thread.run_sync(ends.embed, ids)
            await session.prefill(embedded, 0)
            keep = await session.settle() is None and kept_s(session) > 0
    except PeerError as exc:
        logger.debug("prefill.not_shared why=%s", exc)
    finally:
        await session.aclose(keep=keep)
    if keep:
        texts.note(ids, session)
