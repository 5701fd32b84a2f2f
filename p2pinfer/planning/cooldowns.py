"""Cooldowns of peers that had no room: excluded from routes for a while, with nothing held against them."""

from __future__ import annotations

from typing import Final

from p2pinfer.recent import Recent

MAX_REMEMBERED: Final = 1024


class Cooldowns:
    """Peers that are not to be asked just yet. `now` is seconds of one monotonic clock."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._until = Recent[str, float](MAX_REMEMBERED)

    def rest(self, peer_id: str, now: float) -> None:
        """Leave a peer alone for the pause."""
        self._until[peer_id] = now + self._pause_s

    def peers(self, now: float) -> frozenset[str]:
        """Peers whose cooldown has not ended."""
        return frozenset(peer_id for peer_id, until in self._until.items() if until > now)
