"""One file that several peers bring: who is asked for which chunks, and who was wrong about one.

Peers that gave the same list of chunks work together, and a chunk is held against that list. So a chunk that
does not fit contradicts what its giver said itself: no other peer's word is needed to know that it lied.
Whether the list is right shows when the file is whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import trio

from p2pinfer.models.pieces.chunks import ChunkList

MAX_LIES: Final = 3  # wrong chunks of one peer, after which it is asked for nothing more
NEAR_RUN: Final = 16  # chunks of one request in a local network
FAR_RUN: Final = 2
STEAL_S: Final = 5.0  # after which a chunk that was asked of one peer is asked of another as well


@dataclass(slots=True)
class Source:
    """A peer that may have what is wanted, and how it has done."""

    peer_id: str
    addrs: tuple[str, ...] = ()
    is_near: bool = False
    is_plain: bool = True  # plain connections to it work, as far as is known
    bytes: int = 0  # that were right
    lies: int = 0
    failures: int = 0  # in a row

    @property
    def is_over(self) -> bool:
        """True if nothing more is asked of it."""
        return self.lies >= MAX_LIES


@dataclass(slots=True)
class _Asked:
    by: str
    at: float


@dataclass(slots=True, eq=False)
class FileJob:
    """The chunks of one file that are missing, and who brings them. For the event loop alone."""

    chunks: ChunkList
    missing: set[int]
    clock: Callable[[], float] = trio.current_time
    done: trio.Event = field(default_factory=trio.Event)
    changed: trio.Event = field(default_factory=trio.Event)  # replaced when set: more may be to take
    came_at: float = 0.0  # when a chunk last came
    _asked: dict[int, _Asked] = field(default_factory=dict[int, _Asked])
    _free: list[int] = field(default_factory=list[int])  # a heap of chunks that nobody was asked for
    _wrong: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    _at_work: set[str] = field(default_factory=set[str])  # peers at work

    def __post_init__(self) -> None:
        self.came_at = self.clock()
        self._free = sorted(self.missing)
        if not self.missing:
            self.done.set()

    def begin(self, source: Source) -> None:
        """A peer is at work from now on."""
        self._at_work.add(source.peer_id)

    def end(self, source: Source) -> None:
        """A peer is not at work any more, so what it was asked for is others' to bring."""
        self._at_work.discard(source.peer_id)
        self._release(index for index, asked in self._asked.items() if asked.by == source.peer_id)

    def take(self, source: Source) -> tuple[int, int] | None:
        """The first and the number of some chunks to ask `source` for; None if there are none for it."""
        most, now = NEAR_RUN if source.is_near else FAR_RUN, self.clock()
        first, count, passed_by = -1, 0, list[int]()
        while self._free and count < most and (not count or self._free[0] <= first + count):
            index = heapq.heappop(self._free)
            if index not in self.missing or index in self._asked or 0 <= index - first < count:
                continue
            if not self._may_ask(source, index):
                passed_by.append(index)
                if count:
                    break
                continue
            first, count = (first, count + 1) if count else (index, 1)
        for index in passed_by:
            heapq.heappush(self._free, index)
        if not count and (late := self._late(source, now)) is not None:
            first, count = late, 1
        for index in range(first, first + count):
            self._asked[index] = _Asked(source.peer_id, now)
        return (first, count) if count else None

    def _may_ask(self, source: Source, index: int) -> bool:
        """False for who was wrong about a chunk, unless nobody else is there."""
        return (source.peer_id, index) not in self._wrong or self._at_work <= {source.peer_id}

    def _late(self, source: Source, now: float) -> int | None:
        """The chunk that another peer was asked for the longest ago, if that is long."""
        late = [
            (asked.at, index)
            for index, asked in self._asked.items()
            if asked.by != source.peer_id and now - asked.at >= STEAL_S and self._may_ask(source, index)
        ]
        return min(late)[1] if late else None

    def note_right(self, source: Source, indices: Iterable[int]) -> int:
        """Chunks have come and are written; returns how many bytes of them are new."""
        fresh = 0
        for index in indices:
            self._asked.pop(index, None)
            if index in self.missing:
                self.missing.discard(index)
                fresh += self.chunks.bytes_of(index)
        if fresh:
            source.bytes += fresh
            source.failures = 0
            self.came_at = self.clock()
        if not self.missing:
            self.done.set()
        return fresh

    def note_wrong(self, source: Source, index: int) -> None:
        """`source` has sent something else as a chunk than it had promised, over an authenticated stream."""
        source.lies += 1
        self._wrong.add((source.peer_id, index))
        self._release([index])

    def give_back(self, source: Source, first: int, count: int) -> None:
        """Chunks that `source` was asked for will not come."""
        mine = [index for index in range(first, first + count) if index in self._asked]
        self._release(index for index in mine if self._asked[index].by == source.peer_id)

    def _release(self, indices: Iterable[int]) -> None:
        for index in list(indices):
            self._asked.pop(index, None)
            if index in self.missing:
                heapq.heappush(self._free, index)
        self.wake()

    def wake(self) -> None:
        """Have everybody who waits look again."""
        self.changed.set()
        self.changed = trio.Event()
