"""What a hop sent to its successor, kept for the life of the session so that a replacement can be fed.

The log holds the very bytes that went out, one entry a step, contiguous in position. All sessions of a node
share one budget; a session reserves its worst case when it opens, so a running one never finds it spent.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from p2pinfer.errors import CacheFull


class ReplayBudget:
    """Bytes of host memory that all replay logs of a node may hold together."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.reserved_bytes = 0

    def reserve(self, size: int) -> None:
        """Take `size` bytes of the budget.

        Raises:
            CacheFull: Less is left; nothing was taken.
        """
        if self.reserved_bytes + size > self.total_bytes:
            left = (self.total_bytes - self.reserved_bytes) / 2**20
            raise CacheFull(f"replay log full: {size / 2**20:.1f} MiB asked, {left:.1f} MiB left")
        self.reserved_bytes += size

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return self.total_bytes - self.reserved_bytes

    def release(self, size: int) -> None:
        """Give back what `reserve` took."""
        self.reserved_bytes -= size
        assert self.reserved_bytes >= 0


@dataclass(frozen=True, slots=True)
class Sent:
    """One step's output as it was sent: `tokens` rows from `position` on."""

    position: int
    tokens: int
    payload: bytes


class ReplayLog:
    """The outputs of one session on one hop, in order of position."""

    def __init__(self, budget: ReplayBudget, max_bytes: int) -> None:
        budget.reserve(max_bytes)
        self._budget = budget
        self.reserved_bytes = max_bytes
        self._sent: list[Sent] = []

    @property
    def tokens(self) -> int:
        """Positions `0..tokens` are in the log."""
        return self._sent[-1].position + self._sent[-1].tokens if self._sent else 0

    def append(self, position: int, tokens: int, payload: bytes) -> None:
        """Add a step's output; a `position` below `tokens` rolls the log back to it first."""
        self.truncate(position)
        assert position == self.tokens, f"a gap in the replay log: {self.tokens} then {position}"
        self._sent.append(Sent(position, tokens, payload))

    def truncate(self, position: int) -> None:
        """Forget everything from `position` on; an entry across it is cut."""
        keep = bisect_left(self._sent, position, key=lambda sent: sent.position)
        del self._sent[keep:]
        if self._sent and self.tokens > position:
            last = self._sent.pop()
            tokens = position - last.position
            row = len(last.payload) // last.tokens
            self._sent.append(Sent(last.position, tokens, last.payload[: tokens * row]))

    def entries(self) -> tuple[Sent, ...]:
        """Everything sent, oldest first."""
        return tuple(self._sent)

    def release(self) -> None:
        """Forget everything and give the budget back; harmless twice."""
        self._sent.clear()
        self._budget.release(self.reserved_bytes)
        self.reserved_bytes = 0
