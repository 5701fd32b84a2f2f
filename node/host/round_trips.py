"""Measured round trips to peers, and deadlines that follow them.

An opening of ten round trips takes half a second between neighbours and half a minute by two satellites. How
far a peer is turns out on the way: when its connection stands, when it answers a ping. So a deadline moves
while work is under way, by as many round trips as that takes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.node.transport.line_rate import MAX_RTT_S
from p2pinfer.recent import Recent

MAX_REMEMBERED: Final = 1024  # peers


@dataclass(slots=True, eq=False)
class _Deadline:
    scope: trio.CancelScope
    peer_ids: frozenset[str]
    began_at: float
    base_s: float
    round_trips: float


class RoundTrips:
    """Last round trip of each peer, and the deadlines that depend on some."""

    def __init__(self) -> None:
        self._rtt_s = Recent[str, float](MAX_REMEMBERED)
        self._deadlines: list[_Deadline] = []

    def note(self, peer_id: str, rtt_s: float) -> None:
        """Note the seconds of a round trip; deadlines that wait for the peer move."""
        self._rtt_s[peer_id] = min(rtt_s, MAX_RTT_S)
        for each in self._deadlines:
            if peer_id in each.peer_ids:
                each.scope.deadline = self._due(each)

    @contextmanager
    def within(
        self, base_s: float, peer_ids: Iterable[str], round_trips: float
    ) -> Generator[trio.CancelScope]:
        """Cancel what runs inside after `base_s` and so many round trips to the farthest of the peers.

        Peers whose round trip is not known count once it is.
        """
        deadline = _Deadline(
            trio.CancelScope(), frozenset(peer_ids), trio.current_time(), base_s, round_trips
        )
        deadline.scope.deadline = self._due(deadline)
        self._deadlines.append(deadline)
        try:
            with deadline.scope:
                yield deadline.scope
        finally:
            self._deadlines.remove(deadline)

    def _due(self, each: _Deadline) -> float:
        farthest_s = max((self._rtt_s.get(peer_id, 0.0) for peer_id in each.peer_ids), default=0.0)
        return each.began_at + each.base_s + each.round_trips * farthest_s
