"""Fair queue of jobs: a client with many jobs delays its own, and nobody else's.

Start-time fair queueing, P. Goyal, H. Vin and H. Cheng (1996): a job's place is the virtual time at which its
client has had its turn, and the job costs so much of that time. Clients that always have jobs waiting get the
same amount of work done; who comes with a first job gets it done next, however long the line is. With one
client, or one job each, it is a line like any other.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator
from operator import itemgetter
from typing import Generic, TypeVar

_Job = TypeVar("_Job")


class FairQueue(Generic[_Job]):
    """Jobs that wait, next one first; those of one client in the order they came."""

    def __init__(self) -> None:
        self._line: list[tuple[float, int, str, _Job]] = []  # place, number, client
        self._next_turns: dict[
            str, float
        ] = {}  # client -> the place of its next job, if that is in the future
        self._now = 0.0  # the place of the first job that was taken last
        self._arrived = 0

    def add(self, client: str, cost: float, job: _Job) -> None:
        """Put a job in line that costs so much work."""
        place = max(self._now, self._next_turns.get(client, 0.0))
        self._next_turns[client] = place + cost
        self._arrived += 1
        insort(self._line, (place, self._arrived, client, job), key=itemgetter(0, 1))

    def __iter__(self) -> Iterator[_Job]:
        return (job for _, _, _, job in self._line)

    def __len__(self) -> int:
        return len(self._line)

    def clients(self) -> set[str]:
        """Clients whose jobs wait."""
        return {client for _, _, client, _ in self._line}

    def take(self, jobs: Collection[_Job]) -> None:
        """Remove jobs that are being done; they are known by their identity."""
        taken = {id(job) for job in jobs}
        begun = [place for place, _, _, job in self._line if id(job) in taken]
        self._line = [entry for entry in self._line if id(entry[3]) not in taken]
        self._now = max(self._now, min(begun, default=0.0))
        if not self._line:
            self._next_turns.clear()
            self._now = 0.0
        elif len(self._next_turns) > 2 * len(self._line) + 16:
            self._next_turns = {client: at for client, at in self._next_turns.items() if at > self._now}
