"""Rate limit of a flow of bytes, as the time to wait before the next ones."""

from __future__ import annotations


class Throttle:
    """A rate that several may share; who asks first goes first.

    Virtual scheduling: every piece occupies the line for its size over the rate, and the line may run
    `burst_s` behind the clock.
    """

    def __init__(self, bytes_per_s: float, burst_s: float = 1.0) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_s
        self._free_at = float("-inf")

    def delay_s(self, size: int, now: float) -> float:
        """Seconds to wait at time `now` before `size` bytes may go on; they are taken to do so then."""
        self._free_at = max(self._free_at, now - self._burst_s) + size / self._bytes_per_s
        return max(0.0, self._free_at - now)
