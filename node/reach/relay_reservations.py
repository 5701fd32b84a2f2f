"""Reservations at relays, kept by a node that cannot be reached directly.

libp2p refreshes a reservation shortly before it expires and not when the relay has died, of which it tells
nobody. Here a lost connection ends the place at once, and the next candidate is asked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import PeerError, PeerRefused
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.host.host import Host
from p2pinfer.recent import Recent

from .circuit import reserve

logger = logging.getLogger(__name__)

RENEW_S: Final = 900.0  # at the latest; half of what a relay grants, if that is less
LEAST_RENEW_S: Final = 30.0
MOST_GRANTED_S: Final = 86_400.0  # a relay that names a time beyond this, or in the past, has another clock
CHECK_S: Final = 5.0  # between looks for relays while one is missing
FIRST_RETRY_S: Final = 10.0  # before a relay that refused is asked again; doubles each time
LAST_RETRY_S: Final = 600.0
STEADY_S: Final = 30.0  # a place that lasted this long was an honest one
MAX_FAILED: Final = 256


@dataclass(frozen=True, slots=True)
class RelayCandidate:
    """A peer outside our router that may carry connections for us."""

    peer_id: str
    addrs: tuple[str, ...]  # where others can dial it, without /p2p


@dataclass(slots=True)
class _Place:
    addrs: tuple[str, ...]
    since: float
    renew_at: float


@dataclass(slots=True)
class _Failures:
    times: int
    retry_at: float


class RelayKeeper:
    """Holds up to `wanted` places at relays and lets the host announce them.

    Args:
        candidates: Gives the relays to try, best first.
        on_change: Called when a place is gained or lost.
    """

    def __init__(
        self,
        host: Host,
        wanted: int,
        candidates: Callable[[], Sequence[RelayCandidate]],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._host = host
        self._wanted = wanted
        self._candidates = candidates
        self._on_change = on_change
        self._places: dict[str, _Place] = {}
        self._failures = Recent[str, _Failures](MAX_FAILED)
        self._news = Pulse()
        self._told_of_clock = False
        host.when_disconnected(self._lose)

    @property
    def relays(self) -> tuple[str, ...]:
        """The peers that we have a place at."""
        return tuple(self._places)

    def look_again(self, *, forgives: bool = False) -> None:
        """Re-evaluate: there are new candidates, or none are needed any more.

        Args:
            forgives: Hold nothing against any relay: our own line has become another one.
        """
        if forgives:
            self._failures.clear()
        self._news.fire()

    async def serve(self) -> None:
        """Keep places until cancelled; while `candidates` gives none, let go of those there are."""
        while True:
            news = self._news.next
            candidates = self._candidates()
            if not candidates and self._places:
                self._places.clear()
                self._publish()
            for peer_id in [each for each, place in self._places.items() if self._is_due(place.renew_at)]:
                await self._reserve(RelayCandidate(peer_id, self._places[peer_id].addrs))
            for candidate in candidates:
                failure = self._failures.get(candidate.peer_id)
                if len(self._places) >= self._wanted:
                    break
                if candidate.peer_id not in self._places and (not failure or self._is_due(failure.retry_at)):
                    await self._reserve(candidate)
            with trio.move_on_at(self._next_look(candidates)):
                await news.wait()

    def _is_due(self, at: float) -> bool:
        return at <= trio.current_time()

    def _next_look(self, candidates: Sequence[RelayCandidate]) -> float:
        dues = [place.renew_at for place in self._places.values()]
        if len(self._places) < self._wanted or not candidates:
            dues.append(trio.current_time() + CHECK_S)
        return min(dues, default=math.inf)  # a host that wants no relay, like a client's, waits for news only

    async def _reserve(self, candidate: RelayCandidate) -> None:
        peer_id = candidate.peer_id
        try:
            await self._host.connect(peer_id, candidate.addrs, hearsay=True)
            if self._host.connection_kind(peer_id) != "direct":
                raise PeerRefused(f"relay {peer_id} is itself behind a relay", peer_id)
            granted = await reserve(self._host, peer_id)
        except PeerError as exc:
            logger.debug("relays.failed relay=%s why=%s", peer_id, exc)
            self._note_failure(peer_id)
            self._lose(peer_id)
            return
        known = self._places.get(peer_id)
        if known is not None:  # it has lasted; until then, what it did before is held against it
            self._failures.pop(peer_id, None)
        renew_at = trio.current_time() + self._renew_after_s(peer_id, granted.expires_s)
        since = known.since if known else trio.current_time()
        self._places[peer_id] = _Place(candidate.addrs, since, renew_at)
        if known is None:
            logger.info("peers can reach this node through relay %s", peer_id)
            self._publish()

    def _renew_after_s(self, peer_id: str, expires_s: float) -> float:
        """Seconds until to ask again. The relay gives its wall clock's time; either clock may be wrong."""
        if 0 < expires_s < MOST_GRANTED_S:
            return min(max(expires_s / 2, LEAST_RENEW_S), RENEW_S)
        if not self._told_of_clock:
            self._told_of_clock = True
            hours = expires_s / 3600
            logger.warning(
                "relay %s says that the reservation ends %+.1f hours from now: one of the two clocks is "
                "wrong, which is harmless",
                peer_id,
                hours,
            )
        return RENEW_S / 3

    def _note_failure(self, peer_id: str) -> None:
        known = self._failures.get(peer_id)
        times = known.times + 1 if known else 1
        delay_s = min(FIRST_RETRY_S * 2 ** min(times - 1, 16), LAST_RETRY_S)
        self._failures[peer_id] = _Failures(times, trio.current_time() + delay_s)

    def _lose(self, peer_id: str) -> None:
        place = self._places.pop(peer_id, None)
        if place is None:
            return
        lasted_s = trio.current_time() - place.since
        logger.info("lost relay %s after %.0f s; looking for another", peer_id, lasted_s)
        if lasted_s < STEADY_S:  # who accepts and then drops is not asked again at once
            self._note_failure(peer_id)
        self._publish()
        self.look_again()

    def _publish(self) -> None:
        self._host.be_reached_through(
            [f"{address}/p2p/{peer_id}" for peer_id, place in self._places.items() for address in place.addrs]
        )
        self._on_change()
