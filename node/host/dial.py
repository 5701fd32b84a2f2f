"""A dial that several callers may wait for."""

from __future__ import annotations

import trio

from p2pinfer.errors import PeerUnreachable


class Dial:
    """A dial under way, and how it ended."""

    def __init__(self, addrs: frozenset[str]) -> None:
        self.addrs = addrs
        self.done = trio.Event()
        self.error: PeerUnreachable | None = None


def check_named(named: str, peer_id: str) -> None:
    """Raises ValueError for an address of another peer than the one that is dialled."""
    if named not in ("", peer_id):
        raise ValueError(f"that is peer {named}")
