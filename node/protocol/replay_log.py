"""Replay log: steps sent to the successor, kept so that a replacement can be fed.

The log holds the very bytes that went out, one entry a step, contiguous in position. All sessions of a node
share one budget; a session reserves its worst case when it opens, or as much as one may have. What it does
not use may be taken back for others (`resize`). A log that outgrows its reservation is given up, and a
replacement has to be fed from further up the chain.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
        """Bytes that are left."""
        return self.total_bytes - self.reserved_bytes

    def release(self, size: int) -> None:
        """Give back what `reserve` took."""
        self.reserved_bytes -= size
        assert self.reserved_bytes >= 0


class ReplayGap(Exception):
    """The log does not hold what was asked of it."""


class LoggedStep(NamedTuple):
    """One step's output as it was sent: `tokens` rows from `position` on."""

    position: int
    tokens: int
    payload: bytes


class ReplayLog:
    """The outputs of one session on one hop, in order of position; at most `max_bytes` of them."""

    def __init__(self, budget: ReplayBudget, max_bytes: int) -> None:
        budget.reserve(max_bytes)
        self._budget = budget
        self.reserved_bytes = max_bytes
        self._sent: list[LoggedStep] = []
        self._bytes = 0
        self._is_whole = True
        self.on_full: Callable[[int], None] = lambda size: None  # may `resize` the log to hold so many bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that are in the log."""
        return self._bytes

    def resize(self, size: int) -> None:
        """Reserve `size` bytes, no fewer than are in the log, in place of what was reserved.

        Raises:
            CacheFull: The budget has not so many; nothing was changed.
        """
        if size > self.reserved_bytes:
            self._budget.reserve(size - self.reserved_bytes)
        else:
            self._budget.release(self.reserved_bytes - size)
        self.reserved_bytes = size

    @property
    def tokens(self) -> int:
        """Positions `0..tokens` are in the log."""
        return self._sent[-1].position + self._sent[-1].tokens if self._sent else 0

    def append(self, position: int, tokens: int, payload: bytes) -> None:
        """Add a step's output; a `position` below `tokens` rolls the log back to it first.

        A log that was given up for its size begins anew with position 0.
        """
        if not self._is_whole and position > 0:
            return
        self._is_whole = True
        last = self._sent[-1] if self._sent else None
        if position != (last.position + last.tokens if last else 0):
            self.truncate(position)
            assert position == self.tokens, f"a gap in the replay log: {self.tokens} then {position}"
        self._bytes += len(payload)
        if self._bytes > self.reserved_bytes:
            self.on_full(self._bytes)
        if self._bytes > self.reserved_bytes:
            self._is_whole = False
            self._bytes = 0
            self._sent.clear()
        else:
            self._sent.append(LoggedStep(position, tokens, payload))

    def truncate(self, position: int) -> None:
        """Forget everything from `position` on; an entry across it is cut."""
        keep = bisect_left(self._sent, position, key=lambda sent: sent.position)
        self._bytes -= sum(len(sent.payload) for sent in self._sent[keep:])
        del self._sent[keep:]
        if self._sent and self.tokens > position:
            last = self._sent.pop()
            kept = _rows(last, last.position, position)
            self._bytes -= len(last.payload) - len(kept)
            self._sent.append(LoggedStep(last.position, position - last.position, kept))

    def entries(self) -> tuple[LoggedStep, ...]:
        """Everything sent, oldest first."""
        return tuple(self._sent)

    def chunks(self, start: int, stop: int, tokens: int) -> Iterator[LoggedStep]:
        """Positions `start` to `stop - 1` in pieces of `tokens` at most, however they were sent.

        What is logged meanwhile does not show.

        Raises:
            ReplayGap: The log does not hold them all.
        """
        if not (0 <= start <= stop <= self.tokens):
            raise ReplayGap(f"positions {start} to {stop} are asked, and {self.tokens} are in the log")
        first = bisect_left(self._sent, start, key=lambda sent: sent.position + sent.tokens - 1)
        return _merged(self._sent[first:], start, stop, tokens)

    def release(self) -> None:
        """Forget everything and give the budget back; harmless twice."""
        self._sent.clear()
        self._bytes = 0
        self._budget.release(self.reserved_bytes)
        self.reserved_bytes = 0


def _merged(entries: list[LoggedStep], start: int, stop: int, tokens: int) -> Iterator[LoggedStep]:
    at = 0
    for begin in range(start, stop, tokens):
        end = min(begin + tokens, stop)
        parts: list[bytes] = []
        while True:
            entry = entries[at]
            parts.append(_rows(entry, begin, end))
            if entry.position + entry.tokens > end:
                break
            at += 1
            if at == len(entries) or entries[at].position >= end:
                break
        yield LoggedStep(begin, end - begin, b"".join(parts))


def _rows(sent: LoggedStep, start: int, stop: int) -> bytes:
    """Rows of an entry that are for positions `start` to `stop - 1`."""
    row = len(sent.payload) // sent.tokens
    return sent.payload[max(start - sent.position, 0) * row : max(stop - sent.position, 0) * row]
