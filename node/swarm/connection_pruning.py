"""Connection pruning: closes connections on a crowded host, to leave places for newcomers.

Everybody who joins by a bootstrap peer stays connected to it, and none of them would ever make room: with 512
places the 513th peer could not join the swarm. So when seven eighths of the places are taken, the longest
connected of those who only gossip with us are hung up on. They have had the time to find others, and whoever
has not comes back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import trio
from libp2p.rcmgr import Direction

from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.concurrency.shield import shielded
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.identity import libp2p_id

logger = logging.getLogger(__name__)

CROWDED: Final = 7 / 8  # of all places
ROOMY: Final = 3 / 4
STAY_S: Final = 20.0  # that everybody has, to take in a table and to find neighbours
RETRY_S: Final = 1.0
GOSSIP: Final = ("/meshsub/", "/floodsub/")


class ConnectionPruning:
    """Hangs up on a crowded host's peers.

    Args:
        is_needed: Whether the connection to a peer is of use to anybody though nothing runs over it.
    """

    def __init__(self, host: Host, is_needed: Callable[[str], bool], stay_s: float = STAY_S) -> None:
        self._network: Any = host.libp2p.get_network()
        self._is_needed = is_needed
        self._stay_s = stay_s
        self._since = dict.fromkeys(host.connected_peers(), trio.current_time())  # who came first is first
        self._came = Pulse()
        host.when_connected(self._note)
        host.when_disconnected(self._forget)

    def _note(self, peer_id: str) -> None:
        self._since[peer_id] = trio.current_time()
        self._came.fire()

    def _forget(self, peer_id: str) -> None:
        self._since.pop(peer_id, None)

    async def keep(self) -> None:
        """Go on until cancelled."""
        places = self._network.connection_config.max_connections
        while True:
            came = self._came.next
            taken = len(self._network.get_connections())
            if taken <= CROWDED * places:
                await came.wait()
            elif surplus := self._idle()[: taken - int(ROOMY * places)]:
                logger.info(
                    "closing the connections of %d peers that only gossip, to make room for others",
                    len(surplus),
                )
                await self._hang_up(surplus)
            else:
                await trio.sleep(RETRY_S)

    def _idle(self) -> list[str]:
        """Peers that have been here long enough, and would lose nothing but a neighbour."""
        before = trio.current_time() - self._stay_s
        return [
            peer_id
            for peer_id, since in self._since.items()
            if since <= before and self._only_gossips(peer_id) and not self._is_needed(peer_id)
        ]

    def _only_gossips(self, peer_id: str) -> bool:
        """True if the peer came to us, and no stream is open to or from it that is not gossip's."""
        return all(
            each.direction == Direction.INBOUND
            and all(str(stream.get_protocol() or "").startswith(GOSSIP) for stream in each.get_streams())
            for each in self._connections(peer_id)
        )

    def _connections(self, peer_id: str) -> list[Any]:
        return [*self._network.connections.get(libp2p_id(peer_id), [])]

    async def _hang_up(self, peer_ids: list[str]) -> None:
        # Not close_peer: it forgets the connection of who comes back meanwhile as well, without closing it.
        with shielded(2):
            async with trio.open_nursery() as nursery:
                for each in [each for peer_id in peer_ids for each in self._connections(peer_id)]:
                    nursery.start_soon(each.close)
