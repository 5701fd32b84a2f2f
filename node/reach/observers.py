"""Rounds of observations: what peers outside see of this host, and when they are asked again.

A router gets another public address without telling anybody inside. So those who see us are asked in rounds,
every minute and at once when something breaks; and what they say in a new round replaces all that was said
before. Between rounds one of those who happen to come is asked now and then (a scout): a node that is visited
learns from its visitors. A scout's word alone changes nothing: it begins a round, in which others are asked
too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from .reachability import Observation, Reachability, is_global

MAX_OBSERVERS: Final = 4  # peers outside the local network that are asked in a round
MAX_ASKED: Final = 32  # peers that are asked in a round, whatever they say
ROUND_S: Final = 60.0  # between rounds when nothing happens
HURRY_S: Final = 5.0  # between rounds at least, whatever happens: each asks peers to dial us
SCOUT_S: Final = 10.0  # between scouts


class Observers:
    """Peers that were asked how they see us, and their answers. `now` is seconds of one monotonic clock.

    Attributes:
        observations: Answers that count, by peer.
    """

    def __init__(self) -> None:
        self.observations: dict[str, Observation] = {}
        self._asked: set[str] = set()
        self._stale: set[str] = set()  # peers whose answer is of a former round
        self._began_at = -math.inf
        self._round_due_at = math.inf  # something is wrong, and a round is to begin by then
        self._scouted_at = -math.inf

    def begin_round(self, now: float) -> None:
        """Ask everybody anew. What was said so far counts until somebody outside answers."""
        self._began_at, self._round_due_at = now, math.inf
        self._asked.clear()
        self._stale = {*self.observations}

    def hurry(self, now: float) -> None:
        """Have a round begin as soon as may be: what was said may not be true any more."""
        self._round_due_at = min(self._round_due_at, max(now, self._began_at + HURRY_S))

    @property
    def is_hurried(self) -> bool:
        """True if the next round begins because something is wrong."""
        return self._round_due_at < math.inf

    @property
    def is_outdated(self) -> bool:
        """True if there are answers, and all of them are of a former round."""
        return bool(self._stale) and self._stale >= self.observations.keys()

    def next_round_at(self) -> float:
        """Time when a round is due."""
        return min(self._began_at + ROUND_S, self._round_due_at)

    def is_observer(self, peer_id: str) -> bool:
        """True if this peer's answer counts."""
        return peer_id in self.observations

    def forget(self, peer_id: str) -> None:
        """Note that a peer is gone: when it comes again, it may see us elsewhere."""
        self._asked.discard(peer_id)

    def choose(self, connected: Sequence[str], now: float) -> tuple[list[str], int]:
        """Peers that may be asked at the moment, and how many of them."""
        fresh = [peer for peer in connected if peer not in self._asked]
        if not fresh or len(self._asked) >= MAX_ASKED:
            return [], 0
        counted = len(outside(self.observations[peer] for peer in self.observations.keys() - self._stale))
        if counted < MAX_OBSERVERS:
            return fresh, MAX_OBSERVERS - counted
        if now >= self._scouted_at + SCOUT_S:
            self._scouted_at = now
            return fresh, 1
        return [], 0

    def note_asked(self, peer_id: str) -> None:
        """Note that a peer is asked."""
        self._asked.add(peer_id)

    def note(self, observation: Observation, believed: Reachability, now: float) -> None:
        """Take an answer in. One that does not fit what is believed begins another round soon."""
        is_outside = is_global(observation.seen_ip)
        if is_outside and self._stale:
            for peer_id in self._stale:
                self.observations.pop(peer_id, None)
            self._stale.clear()
        known = len(outside(self.observations.values()))
        if is_outside and known and contradicts(observation, believed):
            self.hurry(now)
        if not is_outside or known < MAX_OBSERVERS or observation.peer_id in self.observations:
            self.observations[observation.peer_id] = observation


def outside(observations: Iterable[Observation]) -> list[Observation]:
    """Those of peers outside the local network."""
    return [each for each in observations if is_global(each.seen_ip)]


def contradicts(observation: Observation, believed: Reachability) -> bool:
    """True if a peer sees us elsewhere than we believe to be, or does not reach us where we do."""
    is_six = ":" in observation.seen_ip
    ips = [ip for ip in believed.outside_ips if (":" in ip) == is_six]
    if ips and observation.seen_ip not in ips:
        return True
    expects = believed.kind in ("public", "mapped") and not believed.promised and bool(ips)
    return expects and not observation.reached
