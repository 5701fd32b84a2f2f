"""Whereabouts of peers: the addresses at which they were found, not those that they announce.

Anybody can announce any address, and names cost nothing. What can be told a peer by is the address of a
connection with it, whoever dialled; as long as there was none, the addresses that its names resolve to. Names
are looked up in the background, a few at a time, and only of peers that announce nothing else.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from p2pinfer.node.host.host import Host
from p2pinfer.recent import Recent
from p2pinfer.routing.address_ranges import ip_range, name_in, ranges_of_ip
from p2pinfer.routing.announcement import Announcement

logger = logging.getLogger(__name__)

MAX_REMEMBERED: Final = 4096  # peers, and names
ROUND_S: Final = 5.0
NAMES_A_ROUND: Final = 8  # a stranger chooses what is looked up
LOOKUP_S: Final = 5.0
LASTS_S: Final = 900.0  # how long an answer counts
MAX_ADDRS: Final = 8  # of one name

Resolve = Callable[[str], Awaitable[list[str]]]


async def resolve(name: str) -> list[str]:
    """IP addresses of a name.

    Raises:
        OSError: It has none, or nobody could be asked.
    """
    found = await trio.socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class Whereabouts:
    """Address ranges in which peers were found."""

    def __init__(
        self,
        host: Host,
        announced: Callable[[], list[Announcement]],
        *,
        look_up: Resolve = resolve,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._host = host
        self._announced = announced
        self._resolve = look_up
        self._clock = clock
        self._found = Recent[str, str](MAX_REMEMBERED)  # the IP address of the last direct connection
        self._named = Recent[str, tuple[float, frozenset[str]]](MAX_REMEMBERED)  # by name: when, and where

    def watch(self) -> None:
        """Remember from now on where those were found who connect."""
        self._host.when_connected(self._note)

    def found_in(self, peer_id: str) -> frozenset[str] | None:
        """Ranges of the last direct connection with a peer; None if there was none."""
        self._note(peer_id)  # it may have left its relay since it connected
        ip = self._found.get(peer_id)
        return None if ip is None else ranges_of_ip(ip)

    def named_in(self, announcement: Announcement) -> frozenset[str]:
        """Ranges that the names among a peer's addresses resolve to, as far as they were looked up."""
        known = (self._named.get(name) for name in _names(announcement))
        return frozenset(each for answer in known if answer is not None for each in answer[1])

    async def serve(self) -> None:
        """Look names up until cancelled."""
        while True:
            await self.look_up()
            await trio.sleep(ROUND_S)

    async def look_up(self) -> None:
        """Look up some of the names that are due."""
        async with trio.open_nursery() as nursery:
            for name in self._due()[:NAMES_A_ROUND]:
                nursery.start_soon(self._look_up, name)

    def _due(self) -> list[str]:
        now = self._clock()
        names = {
            name
            for each in self._announced()
            if each.addrs and all(map(name_in, each.addrs)) and each.peer_id not in self._found
            for name in _names(each)
        }
        return [name for name in sorted(names) if self._named.get(name, (now - LASTS_S,))[0] <= now - LASTS_S]

    async def _look_up(self, name: str) -> None:
        ips: list[str] = []
        with trio.move_on_after(LOOKUP_S):
            try:
                ips = await self._resolve(name)
            except (OSError, UnicodeError) as exc:
                logger.debug("whereabouts.no_such_name name=%s why=%s", name, exc)
        # Local ones as well: in a private network a name may stand for nothing else.
        ranges = frozenset(each for ip in ips[:MAX_ADDRS] for each in (ip_range(ip), *ranges_of_ip(ip)))
        self._named[name] = self._clock(), ranges

    def _note(self, peer_id: str) -> None:
        if self._host.connection_kind(peer_id) == "direct":
            remote = self._host.remote_address(peer_id)
            if remote is not None:
                self._found[peer_id] = remote[0]


def _names(announcement: Announcement) -> list[str]:
    return list(filter(None, map(name_in, announcement.addrs)))
