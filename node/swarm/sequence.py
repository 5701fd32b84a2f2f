"""Sequence numbers of this node's announcements, which grow whatever happens to the clock.

Neighbours remember the last number for up to a quarter of an hour and listen to nothing below it. So numbers
are reserved on disk, many at a time and before any of them is used: a node that is killed begins again above
all that it may have announced. Where the disk has been lost, or holds the past, neighbours tell: a record in
our name with a later number than ours (`overtaken`) is one that we have signed once, and the next number lies
above it. The wall clock only gives the first number; set back, it does no harm.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from p2pinfer.folders import write_private

logger = logging.getLogger(__name__)

FILE_NAME: Final = "sequence"
RESERVED: Final = 10_000  # numbers at a time: half a day of announcements, one in five seconds
MAX_SEQUENCE: Final = (1 << 63) - 1
_MAX_BYTES: Final = 64


class Sequence:
    """The sequence numbers of one identity. Reads and writes its file at once when made."""

    def __init__(self, data_dir: Path | None = None, wall_clock_s: Callable[[], float] = time.time) -> None:
        """Reserve numbers in `data_dir`; without it they are those of a temporary identity."""
        self._path = None if data_dir is None else data_dir / FILE_NAME
        self._last = min(max(self._read(), int(max(wall_clock_s(), 0.0) * 1000)), MAX_SEQUENCE - 1)
        self._reserved = self._last
        self._listeners: list[Callable[[], None]] = []
        self._reserve()

    @property
    def last(self) -> int:
        """The number that was given out last."""
        return self._last

    def next(self) -> int:
        """A number above all that were given out, by this process or those before it."""
        self._last = min(self._last + 1, MAX_SEQUENCE)
        return self._last

    def overtaken(self, sequence: int) -> None:
        """Somebody holds a record of ours with this number: go on above it, if that is not so anyhow."""
        if self._last < sequence < MAX_SEQUENCE:
            logger.info(
                "a neighbour has announcement %d of this node, whose own count was %d: continuing from there",
                sequence,
                self._last,
            )
            self._last = sequence
            for listener in list(self._listeners):
                listener()

    def when_overtaken(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after every leap."""
        self._listeners.append(listener)

    async def keep_reserved(self) -> None:
        """Reserve more where half of what was reserved is used up. To be awaited before every use."""
        if self._last > self._reserved - RESERVED // 2:
            await trio.to_thread.run_sync(self._reserve)

    def _reserve(self) -> None:
        self._reserved = min(self._last + RESERVED, MAX_SEQUENCE)
        if self._path is None:
            return
        try:
            write_private(self._path, f"{self._reserved}\n".encode("ascii"), durable=True)
        except OSError as exc:
            logger.warning(
                "cannot save the number of this node's last announcement in %s: %s",
                self._path,
                exc.strerror or exc,
            )

    def _read(self) -> int:
        """The reserved number; 0 if nothing was, or the file is damaged."""
        if self._path is None:
            return 0
        try:
            with self._path.open("rb") as file:
                text = file.read(_MAX_BYTES).strip()
        except OSError:
            return 0
        return int(text) if text.isdigit() else 0
