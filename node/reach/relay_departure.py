"""Direct connections to peers that came through a relay and have become reachable since."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import trio

from p2pinfer.node.host.host import Host
from p2pinfer.routing.announcement import Announcement

from .reachability import global_addrs

logger = logging.getLogger(__name__)

LEAVE_RELAY_S: Final = 1.0  # between looks whether a relayed peer can be reached as it is
STRAIGHT_S: Final = 3.0  # for a dial to such a peer, and so many round trips
ROUND_TRIPS: Final = 8


async def leave_relays(host: Host, announcements: Callable[[], Sequence[Announcement]]) -> None:
    """Dial peers that we have through a relay only, once they announce that they can be reached.

    A router may take seconds to map a port, and who came through a relay before would stay there.
    """
    tried: dict[str, int] = {}  # by peer, the announcement that was of no use
    while True:
        await trio.sleep(LEAVE_RELAY_S)
        relayed = {peer for peer in host.connected_peers() if host.connection_kind(peer) == "relayed"}
        tried = {peer: sequence for peer, sequence in tried.items() if peer in relayed}
        for peer in announcements() if relayed else ():
            reachable = peer.reachability in ("public", "mapped") and peer.peer_id in relayed
            if reachable and tried.get(peer.peer_id) != peer.sequence:
                tried[peer.peer_id] = peer.sequence
                await _dial_straight(host, peer.peer_id, global_addrs(peer.addrs))


async def _dial_straight(host: Host, peer_id: str, addrs: Sequence[str]) -> None:
    for address in addrs:
        with host.within(STRAIGHT_S, [peer_id], ROUND_TRIPS):
            try:
                await host.dial_from(peer_id, address, None, responding=False)
                return
            except Exception as exc:  # whatever it is, it is this address's trouble
                logger.debug("reach.not_straight peer=%s address=%s why=%r", peer_id, address, exc)
