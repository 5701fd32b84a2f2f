"""Who may connect, and how many streams each peer may open; who is refused is told why.

The reasons are numbers that yamux carries: for a connection in the length of a GO_AWAY, for a stream in that
of a reset. -- libp2p specs, error-codes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import trio

from p2pinfer.errors import ConfigError

from .host_config import HostConfig
from .identity import is_peer_id
from .rates import RateLimit

RESOURCE_LIMIT_EXCEEDED: Final = 0x1002
RATE_LIMITED: Final = 0x1003
GATED: Final = 0x1008

MAX_REMEMBERED: Final = 1024
_REASONS: Final = {
    RESOURCE_LIMIT_EXCEEDED: "it has as many streams open as it allows",
    RATE_LIMITED: "it lets nobody open streams that fast",
    GATED: "it does not let us in: we are on its deny list, or not on its allow list",
}


def reason(code: int) -> str:
    """What a number that a peer sent stands for; empty if for nothing that we know."""
    return _REASONS.get(code, "")


class Gate:
    """One host's, shared by all of its connections.

    Args:
        on_refusal: Called with the reason, as a metric names it, of everything that is refused.

    Raises:
        ConfigError: `config.allow` or `config.deny` names something that is neither a peer id nor a list.
    """

    def __init__(self, config: HostConfig, on_refusal: Callable[[str], None] = lambda reason: None) -> None:
        self._allowed = _peer_ids(config.allow) if config.allow else None
        self._denied = _peer_ids(config.deny)
        self._max_streams = config.max_streams
        self._max_streams_per_peer = config.max_streams_per_peer
        self._rate = RateLimit(config.streams_per_s, config.streams_at_once)
        self._open = Counter[str]()
        self._total = 0
        self._on_refusal = on_refusal
        self._turned_us_away: dict[str, None] = {}

    def admits(self, peer_id: str) -> bool:
        """Whether we have anything to do with this peer."""
        return peer_id not in self._denied and (self._allowed is None or peer_id in self._allowed)

    def lets_in(self, peer_id: str) -> bool:
        """`admits`, asked of a peer that connects."""
        if self.admits(peer_id):
            return True
        self._on_refusal("gated")
        return False

    def take_stream(self, peer_id: str) -> int:
        """Count a stream that a peer opens: 0, or the number to refuse it with."""
        code = self._judge(peer_id)
        if code:
            self._on_refusal("rate" if code == RATE_LIMITED else "streams")
            return code
        self._open[peer_id] += 1
        self._total += 1
        return 0

    def give_back(self, peer_id: str) -> None:
        """A stream that `take_stream` counted is over."""
        self._total -= 1
        self._open[peer_id] -= 1
        if not self._open[peer_id]:
            del self._open[peer_id]

    @property
    def streams(self) -> int:
        """How many streams of peers are open."""
        return self._total

    def note_turned_away(self, peer_id: str) -> None:
        """A peer said that it does not let us in."""
        self._turned_us_away.pop(peer_id, None)
        self._turned_us_away[peer_id] = None
        if len(self._turned_us_away) > MAX_REMEMBERED:
            del self._turned_us_away[next(iter(self._turned_us_away))]

    def has_turned_us_away(self, peer_id: str) -> bool:
        """Whether that was the last thing it said; asking forgets it."""
        has = peer_id in self._turned_us_away
        self._turned_us_away.pop(peer_id, None)
        return has

    def _judge(self, peer_id: str) -> int:
        if self._total >= self._max_streams or self._open[peer_id] >= self._max_streams_per_peer:
            return RESOURCE_LIMIT_EXCEEDED
        return 0 if self._rate.allows(peer_id, trio.current_time()) else RATE_LIMITED


def _peer_ids(entries: Sequence[str]) -> frozenset[str]:
    """Peer ids as they are, and those in files: one a line, `#` begins a comment."""
    found: set[str] = set()
    for entry in entries:
        if is_peer_id(entry):
            found.add(entry)
            continue
        try:
            lines = Path(entry).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{entry} is neither a peer id nor a file of them that can be read") from exc
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if text and not is_peer_id(text):
                raise ConfigError(f"{entry}, line {number}: {text[:60]!r} is not a peer id")
            found.update({text} - {""})
    return frozenset(found)
