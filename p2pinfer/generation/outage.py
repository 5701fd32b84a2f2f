"""Patience of a generation during an outage, and its reports meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import NoRoute, PeerError

FIRST_PAUSE_S: Final = 0.25  # between two looks for a route, if there is no news in between
LAST_PAUSE_S: Final = 4.0
OTHERS_S: Final = 1.0  # to hear of other peers, if all that are known refuse for good


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """Limits of a generation's waiting, and of its attempts."""

    find_s: float = 0.0  # for a first route, seconds
    wait_s: float = 0.0  # for a replacement in the middle of a text, from the failure on, seconds
    max_attempts: int = 8  # routes that fail in a row before it pauses, or at its beginning gives up


@dataclass(frozen=True, slots=True)
class Waiting:
    """A generation in the middle of its text has nobody to go on with, and waits."""

    reason: str  # one line
    missing: tuple[tuple[int, int], ...]  # the spans that nobody serves, as far as known
    left_s: float  # for how much longer


class Outage:
    """The time since a token was due: what failed, what to try next, and when it has been long enough.

    Those that failed are given another chance once in every round, because they may be back and are better
    than nobody. Between rounds there is a pause, which news ends early and which grows without it.
    """

    def __init__(self, retry_limits: RetryLimits, *, begun: bool) -> None:
        self.failure: PeerError | None = None  # the last one
        self._begun = begun
        self._only_lasting = True  # nothing else has failed so far
        self._began_at = trio.current_time()
        self._max_attempts = retry_limits.max_attempts
        self._deadline = trio.current_time() + (retry_limits.wait_s if begun else retry_limits.find_s)
        self._pause_s = FIRST_PAUSE_S
        self._attempts = 0  # that failed in this round
        self._forgave = False  # in this round
        self._told = ""

    def note(self, failure: PeerError) -> None:
        """Note that another route failed."""
        self.failure = failure
        self._only_lasting &= failure.is_lasting
        self._attempts += 1

    @property
    def may_try_on(self) -> bool:
        """True if another route is to be tried at once."""
        return self._attempts < self._max_attempts

    def take_forgiveness(self) -> bool:
        """Take this round's chance to try failed peers again at once; False if there is none."""
        if self._is_hopeless:
            return False
        forgives, self._forgave = not self._forgave, True
        return forgives

    @property
    def _is_hopeless(self) -> bool:
        """True if every peer that was tried for a first token refuses for good: time will not help."""
        return self.failure is not None and self._only_lasting and not self._begun

    def describe(self, error: PeerError | NoRoute) -> str:
        """Reason why there is no token, in one line."""
        if isinstance(error, PeerError) or self.failure is None:
            return str(error)
        return f"{error}; the last one failed: {self.failure}"

    async def pause(
        self, error: PeerError | NoRoute, changed: trio.Event, on_wait: Callable[[Waiting], None]
    ) -> bool:
        """Wait until a new round is worth while; False, at once, if it has been long enough.

        Args:
            changed: Set with the next piece of news.
            on_wait: Told about every reason once, if the text has begun.
        """
        # Asked only between rounds: an attempt that is under way is never cut short, it may be the one that
        # works.
        deadline = min(self._deadline, self._began_at + OTHERS_S) if self._is_hopeless else self._deadline
        left_s = deadline - trio.current_time()
        if left_s <= 0:
            return False
        missing = error.missing if isinstance(error, NoRoute) else ()
        reason = error.reason if isinstance(error, NoRoute) else str(error)
        if self._begun and self._told != reason:
            self._told = reason
            on_wait(Waiting(self.describe(error), missing, left_s))
        # `changed` was taken before the attempt that failed, so news that came during it ends the pause at
        # once. Without news the pauses double: a peer may be back and have nothing new to announce.
        with trio.move_on_after(min(self._pause_s, left_s)):
            await changed.wait()
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
        # A second pardon in this round would try the same peers again without any pause.
        self._attempts, self._forgave = 0, True  # the caller forgives everybody
        return True
