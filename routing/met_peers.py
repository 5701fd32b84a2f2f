"""Peers that this process has met, whose place in a table no hearsay can take.

To meet a peer takes a connection in which it proved its key, so an address where somebody listens. That is
what an invented peer lacks. Who has one address can still bring any number of keys there: of one address
range only so many count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from p2pinfer.recent import Recent

MAX_FAILED = 2048


class MetPeers:
    """Peers that answered, by the address range where they did, and peers that were tried in vain."""

    def __init__(self, most: int, most_per_range: int) -> None:
        self._most = most
        self._most_per_range = most_per_range
        self._ranges: dict[str, str] = {}  # peer id -> range; whoever was met longest ago first
        self._crowd = Counter[str]()
        self._failed = Recent[str, None](MAX_FAILED)

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def note(self, peer_id: str, address_range: str) -> None:
        """A peer proved its key, connected from or at this range; empty: one that has no bound."""
        self._failed.pop(peer_id, None)
        self._forget(peer_id)
        if address_range and self._crowd[address_range] >= self._most_per_range:
            self._forget(next(each for each, name in self._ranges.items() if name == address_range))
        self._ranges[peer_id] = address_range
        self._crowd[address_range] += 1
        if len(self._ranges) > self._most:
            self._forget(next(iter(self._ranges)))

    def note_failed(self, peer_id: str) -> None:
        """No address of a peer answered. One that was met before keeps its place: it may be back."""
        if peer_id not in self._ranges:
            self._failed[peer_id] = None

    def failed(self) -> Iterator[str]:
        """Peers that never answered when tried, those tried longest ago first."""
        return iter(self._failed)

    def _forget(self, peer_id: str) -> None:
        name = self._ranges.pop(peer_id, None)
        if name is not None:
            self._crowd[name] -= 1
            if not self._crowd[name]:
                del self._crowd[name]
