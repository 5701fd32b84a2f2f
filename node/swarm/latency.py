"""Round-trip times to peers: pinged where connected, estimated from coordinates elsewhere."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final

import trio

from p2pinfer.errors import PeerError
from p2pinfer.node.host.network import Network
from p2pinfer.recent import Recent
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.coordinates import Coordinate, starting_coordinate, update

logger = logging.getLogger(__name__)

FIRST_ROUND_S: Final = 1.0
ROUND_S: Final = 30.0
PEERS_A_ROUND: Final = 4
MAX_REMEMBERED: Final = 1024


class Latency:
    """Pings a few connected peers now and then, and moves our coordinate by what it finds."""

    def __init__(self, host: Network, announcements: Callable[[], list[Announcement]]) -> None:
        self.coordinate: Coordinate = starting_coordinate(host.peer_id)
        self._host = host
        self._announcements = announcements
        self._rtt_ms = Recent[str, float](MAX_REMEMBERED)

    def rtt_ms(self, peer_id: str) -> float | None:
        """The last measured round trip to a peer; None if it was never measured."""
        return self._rtt_ms.get(peer_id)

    async def serve(self) -> None:
        """Measure until cancelled."""
        wait_s = FIRST_ROUND_S
        while True:
            await trio.sleep(wait_s)
            wait_s = ROUND_S
            connected = self._host.connected_peers()
            for peer_id in random.sample(connected, min(PEERS_A_ROUND, len(connected))):
                await self.measure(peer_id)

    async def measure(self, peer_id: str) -> None:
        """Ping one connected peer; quiet if it does not answer."""
        try:
            rtt_ms = await self._host.ping(peer_id) * 1e3
        except PeerError as exc:
            logger.debug("latency.failed peer=%s why=%s", peer_id, exc)
            self._rtt_ms.pop(peer_id, None)
            return
        self._rtt_ms[peer_id] = rtt_ms
        theirs = next((peer.coordinate for peer in self._announcements() if peer.peer_id == peer_id), None)
        if theirs is not None:
            self.coordinate = update(self.coordinate, theirs, rtt_ms)
