"""Running means of passes by hop: one that strays from them is audited for certain, and nobody is judged.

Each figure of a hop's passes (`models.verify.pass_figures`) has a mean and a variance, and beside them a mean
of the latest ones. A hop that begins to scale its gradients, or to return those of a cheaper model, moves
that mean within a few passes. The data may have changed as well; an audit tells the two apart, and after it
the figures begin anew.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Final

LEARNT_FROM: Final = 12  # passes, before which nothing strays
STRAYS: Final = 5.0  # deviations of the mean of the latest passes
_LATEST: Final = 0.3  # weight of the latest pass in that mean
_NOISE: Final = (_LATEST / (2 - _LATEST)) ** 0.5  # its deviation, in those of one pass
_LEAST: Final = 1e-3  # deviation of one pass, which rounding alone has
_REMEMBERED: Final = 64  # outputs


class _Figure:
    """Mean and variance of one figure (Welford), and the mean of the latest values."""

    __slots__ = ("_count", "_latest", "_mean", "_squares")

    def __init__(self) -> None:
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0
        self._latest = 0.0

    def strays_with(self, value: float) -> bool:
        """Take in a value; True if the latest ones together stray from those before."""
        if self._count >= LEARNT_FROM:
            self._latest += _LATEST * (value - self._latest)
            deviation = max(math.sqrt(self._squares / self._count), _LEAST)
            away = abs(self._latest - self._mean) / (_NOISE * deviation)
            if away > STRAYS / 2:  # nothing is learnt from what may be a lie
                return away > STRAYS
        self._count += 1
        change = value - self._mean
        self._mean += change / self._count
        self._squares += change * (value - self._mean)
        if self._count <= LEARNT_FROM:
            self._latest = self._mean
        return False


class RunningMeans:
    """Figures of the passes of one hop."""

    def __init__(self) -> None:
        self._figures: dict[Hashable, _Figure] = {}
        self._outputs: OrderedDict[bytes, bytes] = OrderedDict()  # what each came of

    def strays(self, kind: Hashable, figures: Mapping[str, float], *, asked: bytes, output: bytes) -> bool:
        """Take in a pass; True if it is unlike those before, or has the results of another one.

        Args:
            kind: Passes of one kind are alike: their direction, blocks, and what was wanted of them.
            asked: Digest of what the pass was given.
            output: Digest of what came back.
        """
        found = [
            self._figures.setdefault((kind, name), _Figure()).strays_with(value)
            for name, value in figures.items()
        ]
        is_stale = self._outputs.setdefault(output, asked) != asked
        if len(self._outputs) > _REMEMBERED:
            self._outputs.popitem(last=False)
        return is_stale or any(found)

    def begin_anew(self) -> None:
        """Forget the figures: an audit has found the latest ones in order."""
        self._figures.clear()
