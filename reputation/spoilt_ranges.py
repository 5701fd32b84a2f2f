"""Address ranges where banned peers were found, kept ban by ban, so that a route costs no look at all peers.

One ban spoils the range that one customer may have. A larger allocation, of which somebody may have many such
ranges (an IPv6 /32), is spoilt by the second of them: so its owner gains one more start, and the other
customers of a provider lose nothing by one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from p2pinfer.recent import Recent

from .account import Account

MAX_PEERS: Final = 4096  # banned ones whose ranges are remembered; the latest found
_ALLOCATION: Final = "/32"  # of IPv6, as the end of a range's name


class SpoiltRanges:
    """Ranges by banned peer, and the set of them that newcomers have to wait in."""

    def __init__(self) -> None:
        self._found = Recent[str, tuple[float, tuple[str, ...]]](MAX_PEERS)  # when banned, and where
        self._spoilt: frozenset[str] = frozenset()
        self._since = 0.0  # the beginning of the time that `_spoilt` is about
        self._first_at: float | None = None  # the earliest ban in it; None: to be reckoned anew

    def put(self, peer_id: str, account: Account) -> None:
        """Take in what a peer's account says of it."""
        if account.ban is None or not account.ranges:
            self.drop(peer_id)
            return
        found = account.ban.at, account.ranges
        if self._found.get(peer_id) != found:
            self._found[peer_id] = found
            self._first_at = None

    def drop(self, peer_id: str) -> None:
        """Forget where a peer was."""
        if self._found.pop(peer_id, None) is not None:
            self._first_at = None

    def since(self, start: float) -> frozenset[str]:
        """Ranges of peers that were banned at `start` or later."""
        if self._first_at is None or not self._since <= start <= self._first_at:
            lately = [(at, ranges) for at, ranges in self._found.values() if at >= start]
            self._spoilt = frozenset(_spoilt(ranges for _, ranges in lately))
            self._since, self._first_at = start, min((at for at, _ in lately), default=float("inf"))
        return self._spoilt


def _spoilt(found: Iterator[tuple[str, ...]]) -> Iterator[str]:
    parts: dict[str, set[str]] = {}  # of an allocation
    for ranges in found:
        narrow = [each for each in ranges if not _is_allocation(each)]
        yield from narrow
        for wide in filter(_is_allocation, ranges):
            parts.setdefault(wide, set()).update(narrow)
    yield from (wide for wide, within in parts.items() if len(within) > 1)


def _is_allocation(name: str) -> bool:
    return ":" in name and name.endswith(_ALLOCATION)
