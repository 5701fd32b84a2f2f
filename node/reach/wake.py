"""Sleep of this computer or process, noticed on waking; and a check of connections that may be dead.

A lid that was closed, or a process that was stopped, leaves connections that look open and a swarm that has
forgotten us. Nothing says so: the clock has jumped, that is all. A beat that comes late shows it at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from p2pinfer.node.host.host import Host

logger = logging.getLogger(__name__)

BEAT_S: Final = 1.0
LATE_S: Final = 5.0  # a beat that is so much too late; a busy computer's are tenths of a second late
SILENT_S: Final = 3.0  # that a connection has for a sign of life, on a line that takes no time


def asleep_too_s() -> float:
    """Seconds of a clock that runs on while the computer sleeps, which trio's does not on every system."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time()  # it may be set back or forward as well, and then looking around does no harm


async def watch_for_sleep(
    on_wake: Callable[[float], Awaitable[None]], clock: Callable[[], float] = asleep_too_s
) -> None:
    """Await `on_wake(seconds)` whenever this process has slept for some seconds; goes on until cancelled."""
    while True:
        awake_at, at = trio.current_time(), clock()
        await trio.sleep(BEAT_S)
        slept_s = max(trio.current_time() - awake_at, clock() - at) - BEAT_S
        if slept_s > LATE_S:
            await on_wake(slept_s)


async def drop_silent(host: Host, within_s: float = SILENT_S) -> None:
    """Ping every connection at once, and end those on which nothing comes, so that they are made anew.

    `within_s` is for a line that takes no time.
    """
    network: Any = host.libp2p.get_network()
    async with trio.open_nursery() as nursery:
        for connections in list(network.connections.values()):
            for each in list(connections):
                nursery.start_soon(_drop_if_silent, each, within_s)


async def _drop_if_silent(connection: Any, within_s: float) -> None:
    if not await connection.muxed_conn.is_answered(within_s):
        logger.debug("connection.silent peer=%s", connection.muxed_conn.peer_id)
        await connection.close()
