"""Texts whose sessions are over, and with whose beginning another text may begin on the same hops.

The next question of a chat begins with everything that was said before. Hops keep the cache of a session that
ended in order for a while, for this client alone. They never see tokens: which text a session held is known
here and nowhere else, and is forgotten with the process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import trio

from p2pinfer.node.protocol.draws import Draw
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.session import Session
from p2pinfer.session.terms import PLAIN, KeptSession, Packing

MAX_TEXTS: Final = 64  # as many as a hop keeps for one client
LEAST_TOKENS: Final = 64  # fewer are computed sooner than a route is chosen for them

# A session that begins with a kept one, on the same hops, for so many tokens, without the excluded peers,
# with the terms of its draws if it has any, and so many positions packed; None if that cannot be had.
OpenBehind: TypeAlias = Callable[
    [KeptSession, int, frozenset[str], ReplaySource, Draw | None, int], Awaitable[Session | None]
]


@dataclass(frozen=True, slots=True)
class _Text:
    ids: tuple[int, ...]
    kept: KeptSession
    until: float


class KeptTexts:
    """Texts of one client, by the sessions that held them."""

    def __init__(self, open_behind: OpenBehind) -> None:
        self._open_behind = open_behind
        self._texts: list[_Text] = []  # oldest first

    def note(self, ids: Sequence[int], session: Session) -> None:
        """Note what a session held that has ended, and that its hops keep, in order of positions."""
        terms, until = session.chain.terms, trio.current_time() + kept_s(session)
        kept = KeptSession(terms.session, session.route, terms.codec, len(ids), terms.packed)
        self._texts = [*self._texts[1 - MAX_TEXTS :], _Text(tuple(ids), kept, until)]

    async def open(
        self,
        ids: Sequence[int],
        tokens: int,
        excluded: frozenset[str],
        replay_source: ReplaySource,
        draw: Draw | None = None,
        packing: Packing = PLAIN,
    ) -> Session | None:
        """A session for `tokens` positions behind the longest beginning of `ids` that hops keep.

        At least one of the ids is left to be computed. None if there is no such beginning, or it cannot be
        had: then any other session does. Where it is open if the prompt travels packed, it does as it did.
        """
        kept = self._longest(ids[:-1], packing)
        if kept is None:
            return None
        packed = _packed(packing, kept)
        session = await self._open_behind(kept, tokens, excluded, replay_source, draw, packed)
        if session is None or not session.chain.prefix:
            self._texts = [each for each in self._texts if each.kept.session != kept.session]
        return session

    def _longest(self, ids: Sequence[int], packing: Packing) -> KeptSession | None:
        now, ids = trio.current_time(), tuple(ids)
        self._texts = [each for each in self._texts if each.until > now]
        # Of equal ones the youngest: the others are nearer to their end.
        counts = [
            (each.kept.common(common_length(each.ids, ids), _packed(packing, each.kept)), number)
            for number, each in enumerate(self._texts)
        ]
        count, number = max(counts, default=(0, 0))
        return replace(self._texts[number].kept, tokens=count) if count >= LEAST_TOKENS else None


def _packed(packing: Packing, kept: KeptSession) -> int:
    """Positions that a session behind this one packs."""
    return packing.tokens if kept.packed or not packing.if_slow else 0


def kept_s(session: Session) -> int:
    """Seconds for which all hops would keep the session's cache beyond its end; 0 if one would not."""
    # Who joined later may have computed the past anew, and its neighbours have it as it was before.
    has_changed = session.repair.done or session.handovers.done
    return 0 if has_changed else min((hop.opened.keeps_s for hop in session.chain.hops), default=0)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of ids with which both begin; both sequences are of one type."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # by halves, for comparing slices is a thousand times as fast as comparing ids
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
