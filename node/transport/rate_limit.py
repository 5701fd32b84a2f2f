"""Rate limit per peer or address: a token bucket for each."""

from __future__ import annotations

MAX_REMEMBERED = 4096


class RateLimit:
    """At most `at_once` in a moment, and `per_s` a second in the long run, for every key."""

    def __init__(self, per_s: float, at_once: int, max_remembered: int = MAX_REMEMBERED) -> None:
        self._per_s = per_s
        self._at_once = at_once
        self._max_remembered = max_remembered
        self._buckets: dict[str, tuple[float, float]] = {}  # key -> (left at that time, time); oldest first

    def allows(self, key: str, now: float) -> bool:
        """True if `key` may do it now; if so, it has done it."""
        left, since = self._buckets.pop(key, (float(self._at_once), now))
        left = min(left + (now - since) * self._per_s, float(self._at_once))
        allowed = left >= 1
        self._buckets[key] = (left - allowed, now)
        if len(self._buckets) > self._max_remembered:
            del self._buckets[next(iter(self._buckets))]  # who has been quiet longest starts afresh
        return allowed
