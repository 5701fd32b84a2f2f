"""What `ratio` means in every benchmark: the quotient of the medians that are printed beside it.

The median of the rounds' own quotients is another number, and on a machine whose speed changes from round to
round it can lie on the other side of 1. `rounds` says how far they lie apart. An aim is kept if `ratio` keeps
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | str]:
    """How many times quicker we were, by times of rounds in which both took turns; above 1 we won.

    Returns:
        `ratio`, and `rounds`: the least and the greatest quotient of a single round.
    """
    quotients = [their / our for our, their in zip(ours, theirs, strict=True)]
    return {"ratio": round(median(theirs) / median(ours), 2), "rounds": spread(quotients)}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The least and the greatest of the rounds' values: `0.93-1.31`."""
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"
