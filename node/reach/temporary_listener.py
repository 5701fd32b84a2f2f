"""Temporary listener: accepts connections for once, on a port that a client already uses."""

from __future__ import annotations

import logging
import socket
from typing import Any, Final

import trio
from libp2p.network.connection.raw_connection import RawConnection
from multiaddr import Multiaddr

from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.tcp import TcpStream, TunedTCP, share_port

logger = logging.getLogger(__name__)

BACKLOG: Final = 16
MAX_AT_ONCE: Final = 16  # handshakes under way


async def keep_open(
    host: Host, ip: str, port: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Let whoever connects in until cancelled; connections that stand stay.

    Raises:
        OSError: The port cannot be listened on.
    """
    network: Any = host.libp2p.get_network()
    address = Multiaddr(f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}")
    transport: TunedTCP = network.transport_manager.transport_for_dialing(address)
    under_way = trio.CapacityLimiter(MAX_AT_ONCE)

    async def let_in(accepted: trio.socket.SocketType) -> None:
        async with under_way:
            raw = RawConnection(transport.guarded(TcpStream(trio.SocketStream(accepted))), False)
            try:
                await network.upgrade_inbound_raw_conn(raw, address)
            except Exception as exc:  # a stranger's handshake can go wrong in any way
                logger.debug("door.failed why=%r", exc)

    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_STREAM) as listener:
        share_port(listener)
        await listener.bind((ip, port))
        listener.listen(BACKLOG)
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                accepted, _ = await listener.accept()
                nursery.start_soon(let_in, accepted)


def reserve_ports() -> list[socket.socket]:
    """Ports that a host which does not listen can be met at, IPv4 and IPv6."""
    reserved: list[socket.socket] = []
    for family, wildcard in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # this system has no IPv6
            continue
        share_port(sock)
        try:
            sock.bind((wildcard, 0))
        except OSError:
            sock.close()
        else:
            reserved.append(sock)
    return reserved
