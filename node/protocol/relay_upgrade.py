"""Move of running streams from relays to direct connections: when it is tried, and what is noted of it.

A stream that began on a relayed connection stays on it when a hole has been punched, since what is under way
cannot change its connection. So another stream is opened on the direct connection, and whoever used the
former one goes on there between two steps. How that is done without losing one differs: `p2pinfer.session`
moves a client's streams, `node.serve` the links between hops.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol, TypeVar

import trio

from p2pinfer.node.host.network import Network
from p2pinfer.node.transport.line_rate import MAX_RTT_S, Line

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.25  # between looks whether a stream can leave its relay
DIRECT_LOOK_S: Final = 1.0  # the same while none is on one: hundreds of sessions look, each for itself
MOVE_S: Final = 5.0  # for one try, and until the next one
PROMPT_S: Final = 10.0  # of a prompt, and so many round trips, before a stream moves in the middle of it
PROMPT_ROUND_TRIPS: Final = 10


class Relayed(Protocol):
    """Something that goes over one connection to a peer, which may be a relayed one."""

    @property
    def peer_id(self) -> str: ...
    @property
    def is_relayed(self) -> bool: ...


_Line = TypeVar("_Line", bound=Relayed)


async def leave_relays(
    host: Network, lines: Callable[[], Iterable[_Line]], move: Callable[[_Line], Awaitable[bool]]
) -> None:
    """Move what is relayed as soon as there is a direct connection, for as long as it runs.

    Args:
        lines: Those that there are at the moment.
        move: One try with one of them. After False the next one waits for `MOVE_S`, or until it is replaced.
    """
    while True:
        await trio.sleep(LOOK_S if any(line.is_relayed for line in lines()) else DIRECT_LOOK_S)
        for line in [*lines()]:
            # In this order: most lines are direct, and a node with hundreds of sessions looks at all of them.
            can_leave = line.is_relayed and host.connection_kind(line.peer_id) == "direct"
            if can_leave and not await move(line):
                with trio.move_on_after(MOVE_S):
                    while line in lines():
                        await trio.sleep(LOOK_S)


def is_worth_moving(prompt_at: float | None, line: Line) -> bool:
    """True unless a prompt is on its way that will probably be through sooner than a move.

    To move, a stream has to run dry, and then begins on a connection that is new: over a long way that is two
    round trips in which nothing is sent, and five until the connection is as fast as the former one. A long
    prompt is worth that, since relays carry no more than they have to.

    Args:
        prompt_at: When the prompt began, by trio's clock; None if none is on its way.
    """
    if prompt_at is None:
        return True
    patience_s = PROMPT_S + PROMPT_ROUND_TRIPS * min(line.rtt_s, MAX_RTT_S)
    return trio.current_time() >= prompt_at + patience_s


def note_moved(host: Network, peer_id: str, began_at: float) -> float:
    """Count a move; returns for how many seconds, since `began_at`, no step could go out."""
    pause_s = trio.current_time() - began_at
    logger.debug("session.moved peer=%s pause_ms=%.0f", peer_id, pause_s * 1e3)
    host.counts.add("upgrades")
    return pause_s
