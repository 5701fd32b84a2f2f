"""Budget of processor time for others' proofs: a share of all time, and of that a part for each teller.

What a proof will cost is known before it is paid: its notice says how many tokens went through how many
blocks, and what such a token took so far says the rest. A proof that is dearer than what is left waits for
another hour, or for another peer to check it. Time that was spent beyond the estimate is owed.
"""

from __future__ import annotations

from typing import Final

from p2pinfer.recent import Recent

BURST_S: Final = 20.0  # of processor time after a quiet while
STRANGERS_BURST_S: Final = 2.0  # the same for proofs about peers that this client has not met
TELLERS_PART: Final = 0.25  # of it for one who tells
_FLOPS: Final = 5e10  # per second, until the first proof has shown what there are
_NEW: Final = 0.3  # weight of the latest measurement
_MAX_TELLERS: Final = 1024


class ExaminationBudget:
    """Token buckets of seconds, for all proofs together and for each teller.

    Args:
        share: Of all time, 0 to 1.
        block_parameters: Weights of a block, for a first estimate.
        burst_s: Processor time that it has after a quiet while.
    """

    def __init__(self, share: float, block_parameters: int, now: float, burst_s: float = BURST_S) -> None:
        self._share = share
        self._burst_s = burst_s
        self._all = _Bucket(burst_s, share, now)
        self._tellers = Recent[str, _Bucket](_MAX_TELLERS)
        self._unit_s = 2 * block_parameters / _FLOPS  # of one token through one block

    def price_s(self, units: int) -> float:
        """Time that so many tokens times blocks may take."""
        return units * self._unit_s

    def affords(self, teller: str, units: int, now: float) -> bool:
        """True if there is time left for so much. What is dearer than a bucket holds needs a full one."""
        price_s = self.price_s(units)
        return self._all.has(price_s, now) and self._bucket_of(teller, now).has(price_s, now)

    def pay(self, teller: str, units: int, spent_s: float, now: float) -> None:
        """Note what was done, and how long it took."""
        self._all.take(spent_s, now)
        self._bucket_of(teller, now).take(spent_s, now)
        if units:
            self._unit_s += _NEW * (spent_s / units - self._unit_s)

    def _bucket_of(self, teller: str, now: float) -> _Bucket:
        if teller not in self._tellers:
            self._tellers[teller] = _Bucket(TELLERS_PART * self._burst_s, TELLERS_PART * self._share, now)
        return self._tellers[teller]


class _Bucket:
    """Seconds that fill up again. They may be owed."""

    def __init__(self, most_s: float, per_s: float, now: float) -> None:
        self._most_s = most_s
        self._per_s = per_s
        self._left_s = most_s
        self._at = now

    def has(self, price_s: float, now: float) -> bool:
        self._fill(now)
        return self._left_s >= min(price_s, self._most_s)

    def take(self, price_s: float, now: float) -> None:
        self._fill(now)
        self._left_s -= price_s

    def _fill(self, now: float) -> None:
        self._left_s = min(self._most_s, self._left_s + max(0.0, now - self._at) * self._per_s)
        self._at = now
