"""Detection of another process with this node's identity, and the choice of which one stops.

Theory of operation. Every process draws an instance when it starts, and its announcements carry it, signed.
A record in our name that we did not sign is not enough to go by: it may be our own, of before a restart, and
anybody may have kept it for years. So nobody is taken for a twin who has not named our instance: it did not
exist before we started and cannot be guessed, so whoever signs it has our key and lives. Two ways lead there:

- Our announcements name the instance of the record that we heard (`twin`). If it lives, it hears of that
  by gossip or in a neighbour's table, and names ours in turn.
- Where that record says to be reached, we ask (`node/swarm/identity_check.py`): the answer names our
  instance at once. This also tells whether an address with our own id, in a list of bootstrap peers, leads
  back to us.

The one that has run for less time stops; of two that started within seconds of each other, the one whose
instance is the larger number. Nobody's clock matters: how long it has run is each one's own count, and how
old a record is, counts from when it was made.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Final, TypeAlias

import trio

from p2pinfer.errors import IdentityTaken
from p2pinfer.routing.announcement import INSTANCE_BYTES, Announcement

logger = logging.getLogger(__name__)

TOGETHER_S: Final = 5.0  # two that started within this time of each other are told apart by their instances
SUSPECTED_S: Final = 600.0  # how long an instance is named; after that somebody else may have been heard

_Clock: TypeAlias = Callable[[], float]


class DuplicateDetector:
    """One process's, for as long as it runs.

    Attributes:
        instance: What names this process among those of its identity.
        taken: Set once this process has to stop for another one's sake.
    """

    def __init__(self, peer_id: str, clock: _Clock = trio.current_time) -> None:
        self.instance = secrets.token_bytes(INSTANCE_BYTES)
        self.taken = trio.Event()
        self.on_suspect: Callable[[Announcement], None] = lambda _: None  # a record that may be a twin's
        self.peer_id = peer_id
        self._clock = clock
        self._started_at = clock()
        self._suspect = b""
        self._suspected_at = 0.0
        self._told = False
        self._where = ""

    @property
    def uptime_s(self) -> float:
        """Seconds that this process has run."""
        return self._clock() - self._started_at

    @property
    def suspect(self) -> bytes:
        """The instance to be named in our announcements; empty if there is none."""
        return self._suspect if self._clock() < self._suspected_at + SUSPECTED_S else b""

    def hear(self, announcement: Announcement, age_s: float = 0.0) -> None:
        """Look at a record in our own name, as it came by gossip or in a table."""
        other = announcement.instance
        if announcement.peer_id != self.peer_id or announcement.leaving or other in (b"", self.instance):
            return
        new = other != self.suspect
        self.name(other)
        if announcement.twin == self.instance:
            where = announcement.addrs[0] if announcement.addrs else ""
            self.meet(other, announcement.uptime_s + age_s, where)
        if new and not self.taken.is_set():
            self.on_suspect(announcement)

    def name(self, other: bytes) -> None:
        """Have our announcements name that instance, so that it answers if it lives."""
        self._suspect, self._suspected_at = other, self._clock()

    def meet(
        self, other: bytes, uptime_s: float, where: str = "", *, own_uptime_s: float | None = None
    ) -> bool:
        """Note that another process of our identity lives; whether it is we who stop.

        Args:
            other: Its instance.
            uptime_s: For how long it has run.
            where: An address of its, for people.
            own_uptime_s: Ours at that moment, or not long before it; now, if it is not given.
        """
        ahead_s = (self.uptime_s if own_uptime_s is None else own_uptime_s) - uptime_s
        later = ahead_s < 0 if abs(ahead_s) > TOGETHER_S else self.instance > other
        if later:
            self._where = where
            self.taken.set()
        elif not self._told:
            self._told = True
            logger.warning(
                "another process has announced itself as %s%s: it has a copy of this node's identity, and "
                "peers cannot tell the two apart. It started later and has to stop; give each node a data "
                "directory of its own",
                self.peer_id,
                f" at {where}" if where else "",
            )
        return later

    async def wait_taken(self, key_file: object) -> None:
        """Go on until this process has to stop.

        Raises:
            IdentityTaken: It has to.
        """
        await self.taken.wait()
        where = f" at {self._where}" if self._where else ""
        raise IdentityTaken(
            f"another node already runs as {self.peer_id}{where}, with a copy of this node's identity, and "
            "peers cannot tell the two apart: start this one with a data directory of its own "
            f"(--data-dir DIR), or delete {key_file} to become a new peer"
        )
