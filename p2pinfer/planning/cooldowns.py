"""Cooldowns of peers that had no room: excluded from routes for a while, with nothing held against them."""

from __future__ import annotations

from typing import Final

MAX_REMEMBERED: Final = 1024


class Cooldowns:
    """Peers that are not to be asked just yet. `now` is seconds of one monotonic clock."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._until: dict[str, float] = {}

    def rest(self, peer_id: str, now: float) -> None:
        """Leave a peer alone for the pause."""
        self._until.pop(peer_id, None)
        self._until[peer_id] = now + self._pause_s
        if len(self._until) > MAX_REMEMBERED:
            del self._until[next(iter(self._until))]

    def peers(self, now: float) -> frozenset[str]:
        """Peers whose cooldown has not ended."""
        self._until = {peer_id: until for peer_id, until in self._until.items() if until > now}
        return frozenset(self._until)
