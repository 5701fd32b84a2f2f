"""Quota of one client: a part of what the others leave.

Whoever is alone gets `share` of everything. The more others hold, the less one may hold, and something is
always left for who comes next: with a share of 3/4, one greedy client leaves a quarter, two come to 3/7 each
and leave a seventh. Nothing is taken from anybody; a client over its share is refused until it has closed
sessions, or others have. These are the dynamic thresholds of A. K. Choudhury and E. L. Hahne, "Dynamic queue
length thresholds for shared-memory packet switches" (1998): at most `share / (1 - share)` times what is free.
"""

from __future__ import annotations


def left_of_share(held: int, free: int, share: float) -> int:
    """Amount of the `free` that a client which holds `held` may still take."""
    return max(0, min(free, int(share * (held + free)) - held))


def exceeds_share(held: int, free: int, share: float) -> bool:
    """True if a client that holds `held` of something, of which `free` is left, holds more than its share."""
    return held > share * (held + free)
