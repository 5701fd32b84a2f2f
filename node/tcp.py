"""TCP that notices when the other side is gone, and sends small messages at once."""

from __future__ import annotations

import socket
from typing import Any

import trio
from libp2p.abc import IRawConnection
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3


def tune(stream: trio.SocketStream, user_timeout_s: float) -> None:
    """Make a connection fail within `user_timeout_s` once nothing comes back, idle or not.

    Without this a path that silently drops packets looks alive for a quarter of an hour.
    """
    set_option = stream.setsockopt
    set_option(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
        ("TCP_USER_TIMEOUT", int(user_timeout_s * 1000)),
    ):
        option = getattr(socket, name, None)  # macOS and Windows lack some
        if option is not None:
            set_option(socket.IPPROTO_TCP, option, value)


class TunedTCP(TCP):
    """libp2p's TCP transport with every connection tuned, dialled or accepted."""

    def __init__(self, user_timeout_s: float) -> None:
        super().__init__()
        self._user_timeout_s = user_timeout_s

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        return self._tuned(await super().dial(maddr))

    async def dial_with_source(self, maddr: Multiaddr, source: tuple[str, int]) -> IRawConnection:
        return self._tuned(await super().dial_with_source(maddr, source))

    def create_listener(self, handler_function: Any) -> Any:
        async def handle(stream: Any) -> None:
            tune(stream.stream, self._user_timeout_s)
            await handler_function(stream)

        return super().create_listener(handle)

    def _tuned(self, connection: Any) -> IRawConnection:
        tune(connection.stream.stream, self._user_timeout_s)
        return connection  # type: ignore[no-any-return]
