"""Shares of the event loop: who takes how much of it, and pauses for those that take too much.

One event loop reads, answers and forwards for everybody. What a peer sends costs time there, and a message of
a few bytes may cost as much as a step of a session. So time is what is counted, not messages: the processor
time of this thread that each peer's messages take, by whoever handles them (`clocked`), as a share of a core
over the last seconds.

As long as all shares together are below `most`, nobody is limited. It is less while steps are computed: the
thread that computes them waits for the interpreter whenever this one runs. Beyond that the peers share it
max-min fairly, as in fair queueing: first the address ranges among each other, because identities are free,
then the peers of a range. Whoever takes less than its part never waits, however great the flood is. Whoever
takes more is read from again when its share has fallen to its part. After `DROP_S` of such waits it is hung
up on, if it is one of the few that take much: of many that take a little, as a bootstrap node's
neighbours do, none is to blame. Neither is a client whose steps are computed here. What reading a step takes
is not counted.
"""

from __future__ import annotations

import math
import time
import types
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Final, TypeVar

import trio

from p2pinfer.recent import Recent

MOST: Final = 0.25  # of a core: what all messages may take before anybody waits
AT_WORK_S: Final = 4.0  # after a step was heard of: those of a slow session are, after some of them
STEP_READ_S: Final = 0.0003  # of reading that a step pays for, on a slow processor
BYTE_READ_S: Final = 1e-8  # the same for each byte of it, which is decrypted and copied
MOST_PAID_S: Final = 0.1  # of reading that is paid for beforehand
WINDOW_S: Final = 4.0  # time constant of the average
LOOK_S: Final = 1.0  # after which a peer that waits is looked at again: the flood may be over
DROP_S: Final = 20.0  # of waiting in `DROP_WINDOW_S`, after which a peer is hung up on
DROP_WINDOW_S: Final = 60.0
MUCH: Final = 0.1  # of `most`
MAX_RANGES: Final = 1024
MAX_PEERS: Final = 64  # of a range
_BOOKED_S: Final = 0.0002  # what is less is added up first: booking costs microseconds
_TOLD_S: Final = 0.001  # what work that goes on has to take before it is told of: several steps of a session
_SOON_S: Final = 0.001  # no wait at all
_LEVEL_S: Final = 0.05  # for how long a level is used before it is computed anew

_T = TypeVar("_T")


class Overspent(Exception):
    """A peer has taken more than its part of the event loop for too long."""


class _Use:
    """Time that fades: its rate is a share of a core."""

    __slots__ = ("_at", "_seconds")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._at = 0.0

    def add(self, seconds: float, now: float, window_s: float = WINDOW_S) -> None:
        self._seconds = self.seconds(now, window_s) + seconds
        self._at = now

    def seconds(self, now: float, window_s: float = WINDOW_S) -> float:
        return self._seconds * math.exp((self._at - now) / window_s)

    def rate(self, now: float) -> float:
        return self.seconds(now) / WINDOW_S


class _Peer:
    __slots__ = ("use", "waited")

    def __init__(self) -> None:
        self.use = _Use()
        self.waited = _Use()


class _Range:
    __slots__ = ("peers", "use")

    def __init__(self) -> None:
        self.use = _Use()
        self.peers = Recent[str, _Peer](MAX_PEERS)


class LoopShares:
    """The accounts of one event loop.

    Attributes:
        is_over: False while all together take so little that nobody has to wait.
    """

    def __init__(
        self,
        most: float = MOST,
        clock: Callable[[], float] = trio.current_time,
        *,
        most_at_work: float | None = None,
    ) -> None:
        """Accounts without entries.

        Args:
            most: What all may take together, as a share of a core.
            clock: Seconds.
            most_at_work: The same while steps are computed, if that is less.
        """
        self.is_over = False
        self.on_overspent: Callable[[str], None] = lambda peer: None  # a peer is hung up on
        self._most = most
        self._most_at_work = most if most_at_work is None else min(most, most_at_work)
        self._worked_at = -math.inf
        self._clock = clock
        self._all = _Use()
        self._ranges = Recent[str, _Range](MAX_RANGES)
        self._level = math.inf
        self._levelled_at = -math.inf

    def meter(self, peer: str, address_range: str) -> Meter:
        """The meter of one peer's messages."""
        return Meter(self, peer, address_range)

    def note_step(self) -> None:
        """Note that a step is computed for somebody."""
        self._worked_at = self._clock()

    def _limit(self, now: float) -> float:
        return self._most_at_work if now - self._worked_at < AT_WORK_S else self._most

    def spend(self, peer: str, address_range: str, seconds: float) -> None:
        """Note processor time that a peer's messages have taken."""
        now = self._clock()
        self._all.add(seconds, now)
        self.is_over = self._all.rate(now) > self._limit(now)
        of_range = self._ranges.get(address_range)
        if of_range is None:
            of_range = self._ranges[address_range] = _Range()
        of_range.use.add(seconds, now)
        of_peer = of_range.peers.get(peer)
        if of_peer is None:
            of_peer = of_range.peers[peer] = _Peer()
        of_peer.use.add(seconds, now)

    def pause_s(self, peer: str, address_range: str) -> float:
        """Seconds that a peer should not be read from; 0 for whoever takes no more than its part."""
        now = self._clock()
        limit = self._limit(now)
        if self._all.rate(now) <= limit:
            self.is_over = False  # until somebody spends more
            return 0.0
        if now - self._levelled_at > _LEVEL_S:
            self._level = fair_level((each.use.rate(now) for each in self._ranges.values()), limit)
            self._levelled_at = now
        of_range = self._ranges.get(address_range)
        if of_range is None or of_range.use.rate(now) <= self._level:
            return 0.0
        level = fair_level((each.use.rate(now) for each in of_range.peers.values()), self._level)
        of_peer = of_range.peers.get(peer)
        if of_peer is None or (rate := of_peer.use.rate(now)) <= level:
            return 0.0
        return WINDOW_S * math.log(rate / level)

    def note_wait(self, peer: str, address_range: str, seconds: float) -> bool:
        """Note that a peer has to wait; True if it takes much, and has had to for too long."""
        of_range = self._ranges.get(address_range)
        of_peer = None if of_range is None else of_range.peers.get(peer)
        now = self._clock()
        if of_peer is None or of_peer.use.rate(now) < MUCH * self._most:
            return False
        of_peer.waited.add(seconds, now, DROP_WINDOW_S)
        return of_peer.waited.seconds(now, DROP_WINDOW_S) > DROP_S


class Meter:
    """Adds up what one peer's messages take, and has it wait.

    Attributes:
        shares: The accounts that it is one of; while they are not `is_over`, `pause` need not be asked.
        address_range: The addresses whose peers share a part.
        steps: Of the peer, computed since it last spent anything. Whoever computes counts them here, without
            a call: each token passes there.
        step_bytes: Size of these steps.
    """

    def __init__(self, shares: LoopShares, peer: str, address_range: str) -> None:
        self.shares = shares
        self._peer = peer
        self.address_range = address_range
        self._pending = 0.0
        self._has_worked = False
        self.steps = self.step_bytes = 0

    def spend(self, seconds: float) -> None:
        """Note processor time; what reading the steps since the last call takes is not counted."""
        self._pending += seconds
        if self.steps:
            self._has_worked = True
            self.shares.note_step()
            paid_s = self.steps * STEP_READ_S + self.step_bytes * BYTE_READ_S
            self._pending = max(self._pending - paid_s, -MOST_PAID_S)
            self.steps = self.step_bytes = 0
        if self._pending > _BOOKED_S:
            self.shares.spend(self._peer, self.address_range, self._pending)
            self._pending = 0.0

    async def pause(self) -> None:
        """Wait while the peer is above its part; returns at once, without a checkpoint, for all others.

        Raises:
            Overspent: It has had to wait for too long.
        """
        shares = self.shares
        while shares.is_over and (pause_s := shares.pause_s(self._peer, self.address_range)) > _SOON_S:
            pause_s = min(pause_s, LOOK_S)
            too_long = shares.note_wait(self._peer, self.address_range, pause_s)
            await trio.sleep(pause_s)
            if too_long and not (self._has_worked or self.steps):
                shares.on_overspent(self._peer)
                raise Overspent(f"peer {self._peer} takes too much of the event loop")


def fair_level(amounts: Iterable[float], most: float) -> float:
    """The level to which the largest of `amounts` have to be cut for all to add up to `most`.

    Max-min fairness: what is below the level stays as it is.
    """
    rest, left = sorted(amounts), most
    for at, amount in enumerate(rest):
        part = left / (len(rest) - at)
        if amount > part:
            return part
        left -= amount
    return math.inf


async def clocked(
    work: Coroutine[Any, Any, _T],
    spend: Callable[[float], None],
    clock: Callable[[], float] = time.thread_time,
) -> _T:
    """Await `work`, and call `spend` with the processor time of its parts between suspensions.

    It is told of several parts at once, and of the rest at the end. The time is that of the thread, not the
    time of day: whatever else runs meanwhile, the thread that computes among it, is not this peer's doing.
    """
    return await _clocked(work, spend, clock)


@types.coroutine
def _clocked(
    work: Coroutine[Any, Any, _T], spend: Callable[[float], None], clock: Callable[[], float]
) -> Generator[Any, Any, _T]:
    resume: Callable[[Any], Any] = work.send
    value: Any = None
    spent_s = 0.0  # and not told of
    try:
        while True:
            began = clock()
            try:
                trap = resume(value)
            finally:
                spent_s += clock() - began
            if spent_s > _TOLD_S:
                spend(spent_s)
                spent_s = 0.0
            try:
                value = yield trap
                resume = work.send
            except BaseException as exc:  # trio's answer to the trap, a cancellation for instance
                value, resume = exc, work.throw
    except StopIteration as stop:
        result: _T = stop.value
        return result
    finally:
        spend(spent_s)
