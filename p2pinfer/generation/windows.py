"""Windows of guesses that follow a trip through the hops while it is under way.

Each is a step of the session, on the assumption that everything before it is right. When something turns out
wrong, all windows that are left are dropped by a new epoch: no hop computes one that it has not begun. The
position of the next step rolls the caches back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import trio

from p2pinfer.errors import PeerError
from p2pinfer.session.pending import Pending
from p2pinfer.session.session import Session

from .ends import Ends

logger = logging.getLogger(__name__)

MOST_UNDER_WAY: Final = 8  # more of them fill queues, and are dropped with the first wrong guess
# Windows of one session. An audit asks for at most 64 receipts that nobody was sent, and a hop that fails in
# a prompt leaves as many as chunks were in flight.
MOST_DROPPED: Final = 32
_LET_COME_S: Final = 3.0  # the longest ways take as long; the last token of a text waits for it

# Guesses to send behind so many windows that are under way; none if that would not pay.
Ahead: TypeAlias = Callable[[int], tuple[int, ...]]


class Windows:
    """Tokens that a session was sent, and the windows among them that nobody has taken yet.

    Attributes:
        sent: So many of the text's tokens are in the session, and these guesses behind them. One value, for a
            thread may ask.
        under_way: Those that nobody has taken, oldest first.
        most: How many the hops take at once, with the trip that they follow.
    """

    def __init__(self) -> None:
        self.sent: tuple[int, tuple[int, ...]] = (0, ())
        self.most = 1
        self.under_way = deque[Pending]()
        self._dropped = 0

    def forget(self) -> None:
        """Await none any more: their session is over, or about to be."""
        self.under_way.clear()
        self._dropped = 0

    async def drop(self, session: Session, position: int) -> None:
        """Let none of them count, since the text goes on otherwise at `position`."""
        self._dropped += len(self.under_way)
        self.under_way.clear()
        await session.roll_back(position)

    async def follow(self, session: Session, ends: Ends, ahead: Ahead) -> None:
        """Send windows behind those that are under way, as long as `ahead` gives any.

        Raises:
            PeerError: The session is over.
        """
        # While a hop is to be replaced, or a stream to move, nothing may wait for that: who waits here does
        # not hear that the trip before has no answer.
        if session.handovers.busy.locked():
            return
        while len(self.under_way) + 1 < self.most and self._dropped < MOST_DROPPED:
            guesses = ahead(len(self.under_way) + 1)
            if not guesses:
                return
            count, before = self.sent
            self.sent = (count, (*before, *guesses))
            self.under_way.append(await session.submit(ends.embed(guesses), count + len(before)))

    async def next(self) -> Any:
        """Outputs of the oldest one.

        Raises:
            PeerError: The session is over.
        """
        outputs = await self.under_way[0]
        self.under_way.popleft()
        return outputs

    async def let_come(self) -> None:
        """Wait until none is under way, but not for long: hops keep no cache that has a step under way."""
        try:
            with trio.move_on_after(_LET_COME_S):
                while self.under_way:
                    await self.under_way.popleft()
        except PeerError as exc:  # of what nobody wants any more; what it says of the session, that says too
            logger.debug("window.lost peer=%s why=%s", exc.peer_id, exc)
