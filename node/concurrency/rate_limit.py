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

    def left(self, key: str, now: float) -> float:
        """Tokens that `key` has."""
        left, since = self._buckets.get(key, (float(self._at_once), now))
        return min(left + (now - since) * self._per_s, float(self._at_once))

    def take(self, key: str, now: float, amount: float = 1) -> bool:
        """Take tokens of `key`; False, with nothing taken, if it has not so many."""
        left = self.left(key, now)
        allowed = left >= amount
        self._buckets[key] = (left - amount * allowed, now)
        return allowed

    def spend(self, key: str, now: float, amount: float) -> None:
        """Take tokens of `key` whether or not it has them: what is missing is waited for the next time."""
        self._buckets[key] = (self.left(key, now) - amount, now)

    def wait_s(self, key: str, now: float, amount: float = 1) -> float:
        """Seconds until `key` has so many tokens, which may not be more than there are at once."""
        return max(0.0, (min(amount, self._at_once) - self.left(key, now)) / self._per_s)

    def give_back(self, key: str, amount: float = 1) -> None:
        """Return tokens that `key` took and did not need."""
        if key in self._buckets:
            left, since = self._buckets[key]
            self._buckets[key] = (min(left + amount, float(self._at_once)), since)
