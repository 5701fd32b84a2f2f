"""Presence of announced peers: which gave a sign of life, and which were silent when dialled.

An announcement counts for two minutes, so a node that was killed is a ghost for as long. What is known sooner
is what became of the last try to reach it: a peer that no address of answers is silent from then on, until it
is heard of again or `SILENT_S` have passed, lest a moment without a network of our own count for ever. Of a
peer that never answered, hearing again is a reason for one more try and no more, since whoever invented it
also announces it: after that it stays silent for twice as long after each try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import trio

from p2pinfer.errors import NotAdmitted, PeerError, PeerUnreachable
from p2pinfer.node.host.host import Host
from p2pinfer.recent import Recent
from p2pinfer.routing.announcement import Announcement

from .live_table import LiveTable

SILENT_S: Final = 60.0  # how long a try that failed counts
LAST_SILENT_S: Final = 3600.0
RETRY_S: Final = 10.0  # between two calls of a peer that was silent
CALLS_AT_ONCE: Final = 32
MAX_CALLED: Final = 256  # peers: whoever looks at a larger swarm cannot call on all of it
MAX_REMEMBERED: Final = 4096


class Presence:
    """Presence of peers as this process knows it. To be told of a host's dials by `watch`."""

    def __init__(self, host: Host, view: LiveTable, clock: Callable[[], float] = trio.current_time) -> None:
        self._host = host
        self._view = view
        self._clock = clock
        # By peer: the announcement believed then, when, and how often in a row.
        self._silent = Recent[str, tuple[int, float, int]](MAX_REMEMBERED)
        self._refusing = Recent[str, None](MAX_REMEMBERED)

    def watch(self) -> None:
        """Learn from every connection of the host, and from every dial that fails, from now on."""
        self._host.when_connected(self._note_heard)
        self._host.when_unreachable(self._note_unreachable)

    def is_silent(self, announced: Announcement) -> bool:
        """True if the peer could not be reached a moment ago, and has not been heard of since."""
        sequence, noted_at, times = self._silent.get(announced.peer_id, (-1, 0.0, 1))
        if sequence < 0:
            return False
        if self._view.has_met(announced.peer_id) or times == 1:
            return announced.sequence <= sequence and self._clock() < noted_at + SILENT_S
        return self._clock() < noted_at + min(SILENT_S * 2.0 ** min(times - 2, 16), LAST_SILENT_S)

    def refuses_us(self, peer_id: str) -> bool:
        """True if the peer answered the last time, and does not let us in."""
        return peer_id in self._refusing

    async def call(self, peers: Sequence[Announcement], within_s: float) -> None:
        """Connect to those of the peers that are not connected, as far as that can be done in the time."""
        connected = {*self._host.connected_peers(), self._host.peer_id}
        due = [each for each in peers if each.peer_id not in connected and self._may_be_called(each)]
        limit = trio.CapacityLimiter(CALLS_AT_ONCE)

        async def call(peer: Announcement) -> None:
            async with limit:
                with suppress(PeerError):  # `_note_unreachable` has heard of it
                    await self._host.connect(peer.peer_id, peer.addrs, hearsay=True)

        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                for peer in due[:MAX_CALLED]:
                    nursery.start_soon(call, peer)

    def _may_be_called(self, peer: Announcement) -> bool:
        noted_at = self._silent.get(peer.peer_id, (0, float("-inf"), 1))[1]
        return bool(peer.addrs) and (not self.is_silent(peer) or self._clock() >= noted_at + RETRY_S)

    def _note_heard(self, peer_id: str) -> None:
        self._silent.pop(peer_id, None)
        self._refusing.pop(peer_id, None)
        remote = self._host.remote_address(peer_id)
        self._view.note_met(peer_id, remote[0] if remote else "")

    def _note_unreachable(self, error: PeerUnreachable) -> None:
        peer_id = error.peer_id
        times = self._silent.pop(peer_id, (0, 0.0, 0))[2]
        self._refusing.pop(peer_id, None)
        if isinstance(error, NotAdmitted):
            self._refusing[peer_id] = None
        else:
            self._silent[peer_id] = max(_latest(self._view, peer_id), 0), self._clock(), times + 1
            self._view.note_failed(peer_id)


def _latest(view: LiveTable, peer_id: str) -> int:
    return max((each.sequence for each in view.everybody() if each.peer_id == peer_id), default=-1)


async def keep_dials_fresh(host: Host, view: LiveTable) -> None:
    """Give dials under way what their peers announce meanwhile; until cancelled.

    A node whose line has got another public address announces that within seconds, and a dial of its former
    address would go on in silence to its limit.
    """
    while True:
        changed = view.changed
        for peer in view.everybody() if host.dials else ():
            if peer.peer_id in host.dials:
                host.dials[peer.peer_id].add(peer.addrs)
        await changed.wait()
