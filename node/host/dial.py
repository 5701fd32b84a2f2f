"""A dial that several callers may wait for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import trio

from p2pinfer.errors import PeerUnreachable
from p2pinfer.routing.announcement import MAX_ADDRS


class Dial:
    """A dial under way, and how it ended."""

    def __init__(self, addrs: frozenset[str]) -> None:
        self.addrs = addrs
        self.done = trio.Event()
        self.error: PeerUnreachable | None = None
        self._heard, self.more = trio.open_memory_channel[str](MAX_ADDRS)

    def add(self, addrs: Iterable[str]) -> None:
        """Try these addresses too, as far as there is room and they are not being tried."""
        for address in addrs:
            if address not in self.addrs:
                with suppress(trio.WouldBlock, trio.BrokenResourceError):
                    self._heard.send_nowait(address)
                    self.addrs |= {address}


def check_named(named: str, peer_id: str) -> None:
    """Raises ValueError for an address of another peer than the one that is dialled."""
    if named not in ("", peer_id):
        raise ValueError(f"that is peer {named}")
