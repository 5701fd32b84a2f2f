"""Addresses of this computer, watched: a laptop moves, and a line at home gets another one at night.

Nobody tells a program. Connections from an address that is gone look open until something is sent on them
and not acknowledged, which takes seconds, and minutes if they are idle.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

import trio

from p2pinfer.node.concurrency.shield import shielded
from p2pinfer.node.host.host import Host
from p2pinfer.node.host.libp2p_host import raw_stream_of
from p2pinfer.node.transport.addresses import machine_addresses

logger = logging.getLogger(__name__)

LOOK_S: Final = 2.0  # between looks, each of which takes a millisecond
HANG_UP_S: Final = 2.0  # for ending connections


def own_addresses() -> frozenset[str]:
    """IP addresses of this computer's interfaces, of both families."""
    return frozenset((*machine_addresses("ip4"), *machine_addresses("ip6")))


async def watch_own_addresses(
    on_change: Callable[[frozenset[str]], Awaitable[None]],
    look: Callable[[], frozenset[str]] = own_addresses,
) -> None:
    """Await `on_change(those that are gone)` whenever the addresses have changed; until cancelled."""
    had = look()
    while True:
        await trio.sleep(LOOK_S)
        have = look()
        if have != had:
            gone, had = had - have, have
            await on_change(gone)


async def hang_up_from(host: Host, addresses: Collection[str]) -> None:
    """End the connections that leave from these addresses of ours, to which nothing comes any more."""
    network: Any = host.libp2p.get_network()
    with shielded(HANG_UP_S):
        async with trio.open_nursery() as nursery:
            for connections in list(network.connections.values()):
                for each in list(connections):
                    if raw_stream_of(each).local_ip in addresses:
                        logger.debug("connection.left_behind peer=%s", each.muxed_conn.peer_id)
                        nursery.start_soon(each.close)
