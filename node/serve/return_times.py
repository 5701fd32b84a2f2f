"""Estimate of when the sessions of a batch return with their next steps.

A decode step's output travels to the client and comes back as the next step. How long that takes is smoothed
per session together with its deviation, as TCP does for round trips (RFC 6298). Whoever is due soon is worth
waiting for: a batch reads the weights once, however many sessions are in it.

With `a` seconds for a batch of any size and `r` for the way out and back, all sessions in step need `a + r`
for one token each, two groups that take turns `2a`. So a wait pays while it is shorter than a batch.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

_GAIN: Final = 1 / 8  # of a new sample in the mean, as in RFC 6298
_DEVIATION_GAIN: Final = 1 / 4
_MARGIN: Final = 2  # deviations that a session may be late and is still waited for

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Return:
    left_at: float | None = None  # None: its step has arrived
    mean_s: float = 0.0
    deviation_s: float = 0.0
    samples: int = 0


class ReturnTimes(Generic[Key]):
    """Sessions that left with an output, and when each is due back. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._sessions: dict[Key, _Return] = {}

    def leave(self, session: Key, now: float) -> None:
        """An output of this session is on its way."""
        known = self._sessions.get(session)
        if known is None:
            known = self._sessions[session] = _Return()
        known.left_at = now

    def arrive(self, session: Key, now: float) -> None:
        """A step of this session is here."""
        known = self._sessions.get(session)
        if known is None or known.left_at is None:
            return
        sample, known.left_at = now - known.left_at, None
        known.samples += 1
        if known.samples == 1:
            known.mean_s, known.deviation_s = sample, sample / 2
        else:
            known.deviation_s += (abs(sample - known.mean_s) - known.deviation_s) * _DEVIATION_GAIN
            known.mean_s += (sample - known.mean_s) * _GAIN

    def forget(self, session: Key) -> None:
        """The session is over, or does something else than decoding; harmless twice."""
        self._sessions.pop(session, None)

    def wait_until(self, now: float, patience_s: float) -> float:
        """Until when to wait for those who are due within `patience_s`; `now` if that is nobody."""
        until, limit = now, now + patience_s
        for each in self._sessions.values():
            if each.left_at is not None and each.samples and each.left_at + each.mean_s <= limit:
                latest = each.left_at + each.mean_s + _MARGIN * each.deviation_s
                until = max(until, min(latest, limit))
        return until
