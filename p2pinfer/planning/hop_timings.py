"""Recent timings of peers, in seconds per step and block, for comparing them."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from p2pinfer.recent import Recent
from p2pinfer.routing.route import Candidate

KEEP_S: Final = 60.0  # after which a peer may be as fast as it says again
MAX_REMEMBERED: Final = 1024


class HopTimings:
    """Seconds a step and block, by peer. `now` is seconds of one monotonic clock."""

    def __init__(self) -> None:
        # By peer: seconds a block, and until when it counts.
        self._per_block_s = Recent[str, tuple[float, float]](MAX_REMEMBERED)

    def note(self, peer_id: str, blocks: int, seconds: float, now: float) -> None:
        """A peer took so long for a step of one token through so many blocks, its queue included."""
        self._per_block_s[peer_id] = (seconds / blocks, now + KEEP_S)

    def known(self, candidate: Candidate, now: float) -> Candidate:
        """The candidate with what was measured of it lately, if anything was."""
        per_block_s, until = self._per_block_s.get(candidate.peer_id, (0.0, now))
        if until <= now:
            return candidate
        return replace(candidate, compute_ms=per_block_s * len(candidate.span) * 1e3)
