"""Straggler detection: hops that have become slow, by the timings they report.

A hop that is slow is no hop that is dead: it is asked for nothing and blamed for nothing. It is worth a look
whether somebody else would be so much faster that feeding them the session's past pays. Looks are ever
rarer, since where one led nowhere the next one hardly will, and a change has to prove itself first.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

from p2pinfer.node.protocol.messages import Bill

STEPS: Final = 8  # the last ones, whose median counts: a single slow step is nothing
FEWEST_STEPS: Final = 4  # in which a hop must have shown how fast it is
FIRST_PAUSE_S: Final = 5.0  # after a look, until the next one
LONGEST_PAUSE_S: Final = 80.0


class Stragglers:
    """The last decode steps of a session's hops. `now` is seconds of one monotonic clock."""

    def __init__(self, least_s: float) -> None:
        """Ignore every hop that spends less than `least_s` on a position."""
        self._least_s = least_s
        self._spent_us = deque[tuple[float, ...]](maxlen=STEPS)  # by hop, for each position
        self._pause_s = FIRST_PAUSE_S
        self._look_at = 0.0

    def note(self, bills: tuple[Bill, ...], tokens: int = 1) -> None:
        """Note the timings of another step, of so many positions."""
        self._spent_us.append(tuple(bill.serve_us / tokens for bill in bills))

    def forget(self) -> None:
        """The hops are others now."""
        self._spent_us.clear()

    def take_slowest(self, now: float) -> tuple[int, float] | None:
        """Take the look that is due: the slowest hop, by its place, and its seconds a position; else None."""
        if len(self._spent_us) < FEWEST_STEPS or now < self._look_at:
            return None
        spent_s = [median(hop) / 1e6 for hop in zip(*self._spent_us, strict=True)]
        slowest_s = max(spent_s)
        if slowest_s < self._least_s:
            return None
        self._look_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return spent_s.index(slowest_s), slowest_s
