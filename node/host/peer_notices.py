"""Notices of peers that connect or disconnect, made from libp2p's of each connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from libp2p.abc import INetConn, INetStream, INetwork, INotifee
from multiaddr import Multiaddr

PeerCallback: TypeAlias = Callable[[str], None]


class PeerNotices(INotifee):
    """Turns libp2p's notice of each connection into one of each peer."""

    def __init__(self, network: Any) -> None:
        self.on_connected: list[PeerCallback] = []
        self.on_disconnected: list[PeerCallback] = []
        self._network = network

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        if len(self._network.connections.get(conn.muxed_conn.peer_id, [])) == 1:
            for callback in self.on_connected:
                callback(str(conn.muxed_conn.peer_id))

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        if conn.muxed_conn.peer_id not in self._network.connections:
            for callback in self.on_disconnected:
                callback(str(conn.muxed_conn.peer_id))

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None: ...

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None: ...
