"""Peers that were not reached or not kept: why, and when each is tried again, ever more slowly."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.recent import Recent

FIRST_RETRY_S: Final = 0.25
LAST_RETRY_S: Final = 30.0
MAX_FAILED: Final = 256  # peers whose failures are remembered


@dataclass(slots=True)
class _Failures:
    why: str  # empty once it has answered
    times: int  # in a row
    noted_at: float
    retry_at: float


class Retries:
    """Failures of peers, by id."""

    def __init__(self) -> None:
        self._failures = Recent[str, _Failures](MAX_FAILED)

    def why(self, peer_id: str) -> str:
        """Reason of the last failure; empty if there was none, or the peer has answered since."""
        failures = self._failures.get(peer_id)
        return failures.why if failures else ""

    def times(self, peer_id: str) -> int:
        """Failures in a row."""
        failures = self._failures.get(peer_id)
        return failures.times if failures else 0

    def describe(self) -> str:
        """Reasons of all peers that have not answered since, in one line."""
        return "; ".join(failures.why for failures in self._failures.values() if failures.why)

    def is_due(self, peer_id: str) -> bool:
        """True if the peer may be tried now."""
        return peer_id not in self._failures or self._failures[peer_id].retry_at <= trio.current_time()

    def dues(self, peer_ids: Iterable[str]) -> list[float]:
        """Times when those of the peers that have failed may be tried again."""
        return [self._failures[each].retry_at for each in peer_ids if each in self._failures]

    def note(self, peer_id: str, why: str, tried_at: float) -> None:
        """Put the next try off, once for every try: who hangs up also leaves a question unanswered."""
        known = self._failures.get(peer_id)
        now = trio.current_time()
        if known is None or known.noted_at < tried_at:
            times = known.times + 1 if known else 1
            delay_s = min(FIRST_RETRY_S * 2 ** min(times - 1, 32), LAST_RETRY_S) * random.uniform(0.8, 1.2)
            known = _Failures(why, times, now, now + delay_s)
        self._failures[peer_id] = known

    def note_answer(self, peer_id: str) -> None:
        """The peer answered. How often it failed is forgotten only once a connection lasts."""
        if peer_id in self._failures:
            self._failures[peer_id].why = ""

    def forget(self, peer_id: str) -> None:
        """A connection to the peer has lasted."""
        self._failures.pop(peer_id, None)
