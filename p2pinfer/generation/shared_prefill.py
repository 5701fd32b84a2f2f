"""One prefill for several texts that begin with the same prompt.

    prompt ──> a session that computes it, and ends ──> hops keep its cache
                                                         ├──> text 1
                                                         ├──> text 2    each in a session behind it
                                                         └──> text 3

Whoever is first has the prompt computed, the others wait for that. Where hops keep nothing, or a hop fails
meanwhile, each text computes its prompt for itself: it costs time, and no text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


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
