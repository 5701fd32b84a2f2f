"""Answers that are larger than their questions: how many at a time, and how many bytes of them a second.

A question of a few bytes may ask for megabytes: a table of peers, the tensors of a session. Whoever asks
again and again would take the whole line, and whoever asks and does not read would have this process hold
what it asked for. So an answer takes a turn first, of which few are held at a time: by one peer, by one
address range, by all. Then its bytes are taken from the budgets of the same three, and it waits where one of
them is spent.

What is unread costs little memory: pieces of an answer are made when the peer has room for them, one at a
time. A peer that takes an answer in too slowly loses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.transport.rate_limit import RateLimit

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
        if any(scope.held[key] >= scope.allowance.turns for scope, key in places):
            raise ProtocolViolation("too many answers at once", stream.peer_id)
        for scope, key in places:
            scope.held[key] += 1
        try:
            yield Answer(stream, places)
        finally:
            for scope, key in places:
                scope.held[key] -= 1
                if not scope.held[key]:
                    del scope.held[key]


class Answer:
    """One answer. Made by `Answers.turn`."""

    def __init__(self, stream: PeerStream, places: list[tuple[_Scope, str]]) -> None:
        self._stream = stream
        self._places = places

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
        while True:
            now = trio.current_time()
            wait_s = max(scope.bytes.wait_s(key, now, size) for scope, key in self._places)
            if wait_s < _SOON_S:
                break
            await trio.sleep(wait_s)
        for scope, key in self._places:
            scope.bytes.spend(key, now, size)


class _Scope:
    """Turns and bytes of those who share an allowance: of every peer, say."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self.held = Counter[str]()
        self.bytes = RateLimit(allowance.bytes_per_s, allowance.burst_bytes)
