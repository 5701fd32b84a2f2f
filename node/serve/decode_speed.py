"""Measured decode speed of a span, as its own steps show it; this is what is announced.

One measurement at the start is right for as long as the computer does nothing else, which is not for long.
The announced speed is therefore that of the latest steps that had the device to themselves, batch 1 as
announcements define it. The median cares for no single step that something came between, and steps of a while
ago count for nothing once there are later ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import isfinite
from statistics import median
from typing import Final

LEAST: Final = 1e-3  # tokens a second; what announcements may say begins and ends further out
MOST: Final = 1e6
WINDOW_STEPS: Final = 64
WINDOW_S: Final = 60.0
LEAST_STEPS: Final = 8  # before these are in, a few later steps do not outweigh what was measured before
WINDOW_CHUNKS: Final = 16
LEAST_TOKEN_S: Final = 1e-9  # of a chunk
MATERIAL: Final = 1.25  # what is announced is corrected when it is so many times off


class DecodeSpeed:
    """The tokens per second of a span, from the seconds that its latest steps took.

    Attributes:
        steps: Those that had the device to themselves: when each ended, on a clock in seconds, and the
            seconds that it took. Whoever runs them adds to it, which is a call less on every token's way.
        chunks: The same of prompts: tokens, and seconds.
    """

    def __init__(self, tokens_per_s: float) -> None:
        """A speed that was measured at the start."""
        self.steps: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        self.chunks: deque[tuple[int, float]] = deque(maxlen=WINDOW_CHUNKS)
        self._tokens_per_s = bounded(tokens_per_s)

    @property
    def tokens_per_s(self) -> float:
        """Finite and above 0, whatever was measured."""
        now = max((at for at, _ in self.steps), default=0.0)
        latest = [
            seconds
            for at, seconds in self.steps
            if now - at <= WINDOW_S and isfinite(seconds) and seconds >= 0
        ]
        if len(latest) >= LEAST_STEPS:
            self._tokens_per_s = bounded(1 / max(median(latest), 1 / MOST))
        return self._tokens_per_s

    @property
    def chunk_cost(self) -> tuple[float, float]:
        """Seconds of a chunk of any length, and of each of its tokens; 0 and 0 if there was none yet.

        The line through a step of one token from which the latest chunks are least far off, by squares.
        """
        one_s = 1 / self.tokens_per_s
        more = [
            (tokens - 1, seconds - one_s)
            for tokens, seconds in self.chunks
            if tokens > 1 and isfinite(seconds)
        ]
        if not more:
            return 0.0, 0.0
        slope = sum(tokens * seconds for tokens, seconds in more) / sum(tokens**2 for tokens, _ in more)
        token_s = min(max(slope, LEAST_TOKEN_S), one_s)
        return one_s - token_s, token_s

    def restart(self, seconds: Sequence[float], now: float) -> None:
        """Forget all steps but these: something was changed."""
        self.steps.clear()
        self.chunks.clear()
        self.steps.extend((now, each) for each in seconds)

    def differs(self, announced: float) -> bool:
        """True if the speed is so far from what was announced that others should know."""
        speed = self.tokens_per_s
        return not announced / MATERIAL <= speed <= announced * MATERIAL


def bounded(tokens_per_s: float) -> float:
    """A speed that can be announced, from one that was reckoned."""
    if not tokens_per_s > LEAST:  # NaN too
        return LEAST
    return min(tokens_per_s, MOST)
