"""Cost of a trip through all hops, by the trips that were made: plain, with guesses, behind others.

No fitted line: that would forget what a guess costs while none are sent. And no means: one trip that stood in
a queue says nothing of the next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Final
from weakref import WeakKeyDictionary

PLAIN_TRIPS: Final = 3  # measured first, where the distance is not known to set the pace
_LAST_PLAIN: Final = 9  # trips without guesses whose median counts
_LAST_GUESSES: Final = 5  # trips with guesses whose median counts
_FAR: Final = 4.0  # times what a token takes in the blocks: from there on the wire sets the pace
_MOST_OFF: Final = 1.25  # times what was expected of a trip; the first one may have met cold caches
_RECENT_S: Final = 5.0  # a text that was counted so lately is taken to go on; satellites' trips take 2 s


class TripCost:
    """Seconds of a trip: those of one without guesses, and more for each guess. Medians of the last trips.

    Until a guess was sent, one is taken to cost as much as a token does in the hops' blocks: a step of
    several positions never computes more than as many steps of one.

    Attributes:
        compute_s: Seconds of a token in the hops' blocks; None if not known.
        expected_s: Seconds that a trip without guesses should take, by the hops' lines; None if not known.
    """

    def __init__(self) -> None:
        self.compute_s: float | None = None
        self.expected_s: float | None = None
        self._plain_s = deque[float](maxlen=_LAST_PLAIN)
        self._guess_s = deque[float](maxlen=_LAST_GUESSES)
        self._behind_s = deque[float](maxlen=_LAST_GUESSES)

    def note(self, positions: int, seconds: float) -> None:
        """Note what a trip with `positions - 1` guesses took."""
        if positions == 1:
            self._plain_s.append(seconds)
        else:
            self._guess_s.append((seconds - self.predict(1)) / (positions - 1))

    def note_behind(self, positions: int, waited_s: float) -> None:
        """Note how long a window was waited for that had been sent behind another one."""
        self._behind_s.append(waited_s / positions)

    def predict(self, positions: int) -> float:
        """Seconds that a trip will take; one with guesses takes no less than one without."""
        plain_s = median(self._plain_s) if self._plain_s else 0.0
        if len(self._plain_s) < PLAIN_TRIPS and self.expected_s is not None:
            plain_s = min(plain_s, _MOST_OFF * self.expected_s)
        guess_s = median(self._guess_s) if self._guess_s else self.compute_s or 0.0
        return plain_s + max(0.0, guess_s) * (positions - 1)

    @property
    def waited_s(self) -> float:
        """Seconds that each position of a window behind another was waited for."""
        return median(self._behind_s) if self._behind_s else self.predict(2) - self.predict(1)

    @property
    def work_s(self) -> float:
        """Seconds by which each position of a window holds up the next window; hops work on several."""
        # With few windows under way most of a wait is for the distance. A guess in one step is never cheaper.
        return min(self.waited_s, self.predict(2) - self.predict(1))

    @property
    def is_known(self) -> bool:
        """True if there is something to go by."""
        if self.is_far:
            return True
        plain_known = len(self._plain_s) >= PLAIN_TRIPS
        return plain_known and (bool(self._guess_s) or self.compute_s is not None)

    @property
    def is_far(self) -> bool:
        """True if delays set the pace, by the lines and by a trip that was made: then guesses are cheap."""
        if self.compute_s is None or self.expected_s is None or not self._plain_s:
            return False
        return min(self.expected_s, *self._plain_s) > _FAR * self.compute_s


class Crowd:
    """The texts of one client. Thread-safe: texts are drawn in threads of their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_at = WeakKeyDictionary[object, float]()  # by text; one that is dropped is none any more
        self._lock = threading.Lock()

    def count(self, text: object) -> int:
        """Texts that are being generated, `text` among them, which says so by asking."""
        now = self._clock()
        with self._lock:
            self._asked_at[text] = now
            return sum(now - at <= _RECENT_S for at in self._asked_at.values())

    def leave(self, text: object) -> None:
        """Count a text no more; harmless twice."""
        with self._lock:
            self._asked_at.pop(text, None)
