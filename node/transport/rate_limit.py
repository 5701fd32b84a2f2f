"""Rate limit per peer or address: a token bucket for each."""

from __future__ import annotations

from p2pinfer.recent import Recent

MAX_REMEMBERED = 4096


class RateLimit:
    """Token buckets: at most `at_once` in a moment, and `per_s` a second in the long run, for every key."""

    def __init__(self, per_s: float, at_once: int, max_remembered: int = MAX_REMEMBERED) -> None:
        self._per_s = per_s
        self._at_once = at_once
        # By key: what was left, and when. Who has been quiet longest starts afresh.
        self._buckets = Recent[str, tuple[float, float]](max_remembered)

    def take(self, key: str, now: float) -> bool:
        """Take one token of `key`; False if it has none left."""
        left, since = self._buckets.get(key, (float(self._at_once), now))
        left = min(left + (now - since) * self._per_s, float(self._at_once))
        allowed = left >= 1
        self._buckets[key] = (left - allowed, now)
        return allowed
