"""Answers that are larger than their questions: how many at a time, and how many bytes of them a second.

A question of a few bytes may ask for megabytes: a table of peers, the tensors of a session. Whoever asks
again and again would take the whole line, and whoever asks and does not read would have this process hold
what it asked for. So an answer takes a turn first, of which few are held at a time: by one peer, by one
address range, by all. Then its bytes are taken from the budgets of the same three, and it waits where one of
them is spent.

What all share is not for whoever comes first. A range that holds turns gets another one only while more are
free than it holds, and likewise a peer in its range: many who ask at once leave room for one who comes later.
Bytes of the shared budget are given out by start-time fair queueing (P. Goyal, H. Vin and H. Cheng, 1996), a
piece at a time, so ten ranges that flood have ten elevenths of it and an honest one has the rest.

What is unread costs little memory: pieces of an answer are made when the peer has room for them, one at a
time. A peer that takes an answer in too slowly loses it.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.transport.peer_stream import PeerStream

PIECE_BYTES: Final = 1 << 16  # of an answer that are made at a time
GRACE_S: Final = 10.0  # for an answer of any size
LEAST_BYTES_PER_S: Final = 16_384  # that whoever asks has to take in, beyond that
_SOON_S: Final = 0.001  # no wait at all: rounding must not have anybody wait for the last byte of a budget


@dataclass(frozen=True, slots=True)
class Allowance:
    """Part of the answers that somebody may have: turns at once, bytes in a burst and a second."""

    turns: int
    burst_bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """Allowances of one peer, of one address range, and of everybody together."""

    peer: Allowance
    address_range: Allowance
    everybody: Allowance


class Answers:
    """The answers of one protocol."""

    def __init__(self, limits: AnswerLimits) -> None:
        self._scopes = (
            _Scope(limits.peer),
            _Scope(limits.address_range),
            _Scope(limits.everybody),
        )
        self._line = _Line(self._scopes[-1].bytes)

    @property
    def turns(self) -> int:
        """Answers under way."""
        return self._scopes[-1].held[""]

    @contextmanager
    def turn(self, stream: PeerStream) -> Generator[Answer]:
        """Hold one of the places for an answer on `stream`, from before its question is read.

        Raises:
            ProtocolViolation: The peer, its address range, or all together hold as many as they may.
        """
        keys = (stream.peer_id, stream.address_range, "")
        places = list(zip(self._scopes, keys, strict=True))
        free = [scope.allowance.turns - scope.held[key] for scope, key in places]
        held = [scope.held[key] for scope, key in places]
        if min(free) <= 0 or any(of_one >= left for of_one, left in zip(held, free[1:], strict=False)):
            raise ProtocolViolation("too many answers at once", stream.peer_id)
        for scope, key in places:
            scope.held[key] += 1
        try:
            yield Answer(stream, places, self._line)
        finally:
            for scope, key in places:
                scope.held[key] -= 1
                if not scope.held[key]:
                    del scope.held[key]


class Answer:
    """One answer. Made by `Answers.turn`."""

    def __init__(self, stream: PeerStream, places: list[tuple[_Scope, str]], line: _Line) -> None:
        self._stream = stream
        self._places = places
        self._line = line

    def bytes_within(self, seconds: float) -> int:
        """Number of bytes that the budgets allow from now until so many seconds later."""
        now = trio.current_time()
        return int(
            min(
                scope.bytes.left(key, now) + seconds * scope.allowance.bytes_per_s
                for scope, key in self._places
            )
        )

    async def send(self, size: int, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send `size` bytes, which `pieces` make up; each is asked for when there is room for it.

        Raises:
            PeerVanished: The peer is gone, or takes them in too slowly.
        """
        limit_s = GRACE_S + size / min(
            LEAST_BYTES_PER_S, *(scope.allowance.bytes_per_s for scope, _ in self._places)
        )
        try:
            with trio.fail_after(limit_s):
                for piece in pieces:
                    with memoryview(piece) as view:
                        for at in range(0, len(view), PIECE_BYTES):
                            part = view[at : at + PIECE_BYTES]
                            await self._stream.wait_send_all_might_not_block()
                            await self._pay(len(part))
                            await self._stream.send_all(part)
        except trio.TooSlowError as exc:
            raise PeerVanished(f"took no answer in within {limit_s:.0f} s", self._stream.peer_id) from exc

    async def _pay(self, size: int) -> None:
        *own, _ = self._places
        while True:
            now = trio.current_time()
            wait_s = max(scope.bytes.wait_s(key, now, size) for scope, key in own)
            if wait_s < _SOON_S:
                break
            await trio.sleep(wait_s)
        for scope, key in own:
            scope.bytes.spend(key, now, size)
        await self._line.pay(self._stream.address_range, size)


class _Line:
    """Those who wait for the budget that all share, in a fair order of address ranges."""

    def __init__(self, budget: RateLimit) -> None:
        self._budget = budget
        self._waiting: list[tuple[float, int]] = []  # (place, number), first in line first
        self._next_places: dict[str, float] = {}  # range -> the place of its next piece
        self._now = 0.0  # the place of the piece that was paid for last
        self._arrived = 0
        self._moved = Pulse()

    async def pay(self, address_range: str, size: int) -> None:
        """Wait for this range's turn, and until the budget has so many bytes; take them."""
        place = max(self._now, self._next_places.get(address_range, 0.0))
        self._next_places[address_range] = place + size
        self._arrived += 1
        entry = (place, self._arrived)
        insort(self._waiting, entry)
        try:
            while True:
                moved = self._moved.next
                if self._waiting[0] != entry:
                    await moved.wait()
                    continue
                now = trio.current_time()
                if (wait_s := self._budget.wait_s("", now, size)) < _SOON_S:
                    break
                with trio.move_on_after(wait_s):
                    await moved.wait()  # somebody with less behind it may have come
            self._budget.spend("", now, size)
            self._now = place
        finally:
            self._waiting.remove(entry)
            if not self._waiting:
                self._next_places.clear()
                self._now = 0.0
            elif len(self._next_places) > 2 * len(self._waiting) + 16:
                self._next_places = {name: at for name, at in self._next_places.items() if at > self._now}
            self._moved.fire()


class _Scope:
    """Turns and bytes of those who share an allowance: of every peer, say."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self.held = Counter[str]()
        self.bytes = RateLimit(allowance.bytes_per_s, allowance.burst_bytes)
