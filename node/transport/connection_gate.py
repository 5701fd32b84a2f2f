"""Connection gate: who may connect and open streams, how many, and the reason for a refusal.

Lists of peers say whom they concern (`peer_lists`). A peer may connect if it is wanted for anything; what it
may do then is asked where it does it. Files are looked at every few seconds, and count as they are from then.

The reasons are numbers that yamux carries: for a connection in the length of a GO_AWAY, for a stream in that
of a reset. -- libp2p specs, error-codes
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import trio

from p2pinfer.errors import ConfigError
from p2pinfer.node.concurrency.loop_share import LoopShares
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.host_config import HostConfig
from p2pinfer.recent import Recent

from .peer_lists import SCOPES, PeerList, Scope, files_of, read_lists

logger = logging.getLogger(__name__)

RESOURCE_LIMIT_EXCEEDED: Final = 0x1002
RATE_LIMITED: Final = 0x1003
GATED: Final = 0x1008

MAX_REMEMBERED: Final = 1024
LOOK_S: Final = 5.0  # between looks at the files of lists
_TELL_S: Final = 60.0  # one peer's refusals are told once in so long
TOLD_AT_ONCE: Final = 10  # of all peers together: who is refused can be somebody else at each try
_REASONS: Final = {
    RESOURCE_LIMIT_EXCEEDED: "it has as many streams open as it allows",
    RATE_LIMITED: "streams were opened faster than it allows",
    GATED: "it rejects this peer: we are on its deny list, or not on its allow list",
}


def reason(code: int) -> str:
    """Meaning of a number that a peer sent; empty if it is unknown."""
    return _REASONS.get(code, "")


class Gate:
    """One host's, shared by all of its connections.

    Args:
        on_refusal: Called with the reason, as a metric names it, of everything that is refused.

    Raises:
        ConfigError: `config.allow` or `config.deny` names something that is neither a peer id nor a list.
    """

    def __init__(self, config: HostConfig, on_refusal: Callable[[str], None] = lambda reason: None) -> None:
        self._config = config
        self._files = files_of((*config.allow, *config.deny))
        self._seen = _look(self._files)
        self.loop_shares = LoopShares(config.loop_share, most_at_work=config.loop_share_at_work)
        self.loop_shares.on_overspent = self._note_overspent
        self._is_closed = False
        self._allowed, self._denied = read_lists(config.allow), read_lists(config.deny)
        self._told = RateLimit(1 / _TELL_S, 1)
        self._told_of_all = RateLimit(TOLD_AT_ONCE / _TELL_S, TOLD_AT_ONCE)
        self._max_streams = config.max_streams
        self._max_streams_per_peer = config.max_streams_per_peer
        self._rate = RateLimit(config.streams_per_s, config.streams_at_once)
        self._open = Counter[str]()
        self._of_range = Counter[str]()
        self._total = 0
        self._on_refusal = on_refusal
        self._turned_us_away = Recent[str, None](MAX_REMEMBERED)

    def admits(self, peer_id: str, scope: Scope | None = None) -> bool:
        """True if we have to do with this peer for that; None: for anything at all."""
        return any(not self._objection(peer_id, each) for each in ([scope] if scope else SCOPES))

    def lets_in(self, peer_id: str) -> bool:
        """`admits`, asked of a peer that connects."""
        if self.admits(peer_id):
            return True
        self._on_refusal("gated")
        if self.take_turn_to_tell(peer_id):
            why = self._objection(peer_id, SCOPES[0])
            logger.warning("rejected a connection from peer %s: %s", peer_id, why)
        return False

    def refuses(self, peer_id: str, scope: Scope) -> str:
        """Reason why a connected peer may not do that, for itself to read; empty if it may."""
        why = self._objection(peer_id, scope)
        if why:
            self._on_refusal("gated")
            if self.take_turn_to_tell(peer_id):
                logger.warning("refused peer %s, which is not admitted for %s: %s", peer_id, scope, why)
        return why

    def take_turn_to_tell(self, peer_id: str) -> bool:
        """Take room in the log for one more refusal of this peer; False if there is none."""
        if self._is_closed:
            return False
        now = time.monotonic()
        return self._told.take(peer_id, now) and self._told_of_all.take("", now)

    def _objection(self, peer_id: str, scope: Scope) -> str:
        if self._denied.has(peer_id, scope):
            return "it is on the deny list"
        if scope in self._allowed.scopes and not self._allowed.has(peer_id, scope):
            return "it is not on the allow list"
        return ""

    async def follow_files(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Go by what the files of the lists say, also when that changes; until cancelled."""
        while self._files:
            await trio.sleep(LOOK_S)
            if await self.look_at_files():
                await on_change()

    async def look_at_files(self) -> bool:
        """Read the lists again if a file of them has changed since the last look; whether they were.

        A file that cannot be used any more changes nothing, and is told of once.
        """
        before, self._seen = self._seen, await trio.to_thread.run_sync(_look, self._files)
        if self._seen == before:
            return False
        config = self._config
        try:
            allowed = await trio.to_thread.run_sync(read_lists, config.allow)
            denied = await trio.to_thread.run_sync(read_lists, config.deny)
        except ConfigError as exc:
            logger.warning("%s; the previous lists stay in force", exc)
            return False
        self._allowed, self._denied = allowed, denied
        logger.info("the lists of peers were read again")
        return True

    def admit_only(self, peer_ids: Iterable[str]) -> None:
        """Have to do with these peers alone from now on, whatever the lists say, and tell of nobody else."""
        self._files, self._denied = [], read_lists(())
        self._is_closed = True
        self._allowed = PeerList(dict.fromkeys(SCOPES, frozenset(peer_ids)), frozenset(SCOPES))

    def _note_overspent(self, peer_id: str) -> None:
        """A peer was hung up on, because its messages take too much of the event loop."""
        self._on_refusal("overspent")
        if self.take_turn_to_tell(peer_id):
            logger.warning("hung up on peer %s: its messages take too much of this node's time", peer_id)

    def take_stream(self, peer_id: str, address_range: str = "") -> int:
        """Count a stream that a peer opens: 0, or the number to refuse it with.

        Peers of a range that has many get another one only while more are free than those have: sixteen keys
        of one machine would take all of `max_streams` otherwise. An empty range is none.
        """
        code = self._judge(peer_id, address_range)
        if code:
            self._on_refusal("rate" if code == RATE_LIMITED else "streams")
            return code
        self._open[peer_id] += 1
        self._of_range[address_range] += 1
        self._total += 1
        return 0

    def give_back(self, peer_id: str, address_range: str = "") -> None:
        """A stream that `take_stream` counted is over."""
        self._total -= 1
        self._of_range[address_range] -= 1
        if not self._of_range[address_range]:
            del self._of_range[address_range]
        self._open[peer_id] -= 1
        if not self._open[peer_id]:
            del self._open[peer_id]

    @property
    def streams(self) -> int:
        """Number of open streams of peers."""
        return self._total

    def note_turned_away(self, peer_id: str) -> None:
        """A peer said that it does not let us in."""
        self._turned_us_away[peer_id] = None

    def take_turned_away(self, peer_id: str) -> bool:
        """Take out what was noted: True if turning us away was the last thing it said."""
        has = peer_id in self._turned_us_away
        self._turned_us_away.pop(peer_id, None)
        return has

    def _judge(self, peer_id: str, address_range: str) -> int:
        free = self._max_streams - self._total
        if free <= 0 or self._open[peer_id] >= self._max_streams_per_peer:
            return RESOURCE_LIMIT_EXCEEDED
        if address_range and self._of_range[address_range] >= free:
            return RESOURCE_LIMIT_EXCEEDED
        return 0 if self._rate.take(peer_id, trio.current_time()) else RATE_LIMITED


def _look(files: Sequence[Path]) -> list[object]:
    """Fingerprint of every file, which changes with the file."""
    found: list[object] = []
    for file in files:
        try:
            stat = file.stat()
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except OSError as exc:
            found.append(exc.errno)
    return found
