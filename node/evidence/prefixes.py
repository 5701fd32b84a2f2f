"""Beginnings of sessions that are over, with which their clients may begin another one.

    session A: 0 ............ p ..... end        keys, values and evidence of A stay while there is room
    session B: 0 ............ p ... steps        B signs anew for 0..p, in pieces, and computes from p on

What stays are pages of the cache, which yield to whoever needs room, and the digests of the steps that stand.
Their contents are evidence, which is kept for auditors anyway. A hop whose evidence is gone could not sign
for the beginning of another session, so that has no such beginning. A beginning belongs to the client that
computed it: nobody else can name it, and nothing is compared by content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from p2pinfer.models.compute.cache import CacheLease, KeptPages, PagedCache
from p2pinfer.node.protocol.messages import Open
from p2pinfer.reputation.receipt import Payload, StandingSteps

MAX_PREFIXES: Final = 512
MAX_STEPS: Final = 1 << 16  # of all together, of some 300 bytes each: every token of a text is a step
MAX_OF_CLIENT: Final = 64


class Rows(NamedTuple):
    """Hidden states of adjacent positions, as they travelled."""

    position: int
    tokens: int
    content: memoryview


@dataclass(frozen=True, slots=True)
class Prefix:
    """Beginning of a session that is over, as far as this hop can answer for it.

    Attributes:
        pages: Its keys and values.
        tokens: Positions of which there is everything.
        inputs: What came in, contiguous in position.
        outputs: What went out; none on the last hop of a route, which signs for a prefix without.
    """

    pages: KeptPages
    tokens: int
    inputs: tuple[Rows, ...]
    outputs: tuple[Rows, ...]

    def piece(self, position: int, tokens: int) -> tuple[bytearray, bytes]:
        """Rows that came in and rows that went out at some positions below `tokens`."""
        return bytearray(_joined(self.inputs, position, tokens)), _joined(self.outputs, position, tokens)


@dataclass(frozen=True, slots=True)
class _Kept:
    opening: Open
    pages: KeptPages
    steps: StandingSteps
    until: float


class Prefixes:
    """Beginnings that the sessions of one span have left.

    Args:
        cache: Of the span.
        find: Gives the evidence with a digest; None if it is gone.
        keep_s: How long a beginning can be named after its session, seconds.
    """

    def __init__(self, cache: PagedCache, find: Callable[[bytes], Payload | None], keep_s: float) -> None:
        self.keep_s = keep_s
        self._cache = cache
        self._find = find
        self._kept: dict[tuple[str, bytes], _Kept] = {}  # by client and session, oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, client: str, opening: Open, lease: CacheLease, steps: StandingSteps, now: float) -> None:
        """Keep what a session has computed, and release its lease. Nothing of it may be under way."""
        self._forget_old(client, now, len(steps))
        if steps.stop:
            pages = lease.keep(steps.stop)
            lease.release()  # or the client's next session could not write where this one ended
            if (former := self._kept.pop((client, opening.session), None)) is not None:
                self._cache.drop(former.pages)
            self._kept[client, opening.session] = _Kept(opening, pages, steps, now + self.keep_s)

    def find(self, client: str, opening: Open, now: float) -> Prefix | None:
        """The beginning that a client asks for, or as much of it as is still here; None if nothing is."""
        asked = opening.prefix
        kept = None if asked is None else self._kept.get((client, asked.session))
        if asked is None or kept is None or kept.until < now or not _continues(opening, kept.opening):
            return None
        inputs = self._contents(kept.steps, [step.input for step, _ in kept.steps])
        tokens = min(asked.tokens, kept.pages.length, _stop(inputs))
        if opening.packed != kept.opening.packed:  # behind the fewer of both, one of them is rounded
            tokens = min(tokens, opening.packed, kept.opening.packed)
        outputs: tuple[Rows, ...] = ()
        if opening.successor is not None:
            outputs = self._contents(kept.steps, [step.output for step, _ in kept.steps])
            tokens = min(tokens, _stop(outputs))
        return Prefix(kept.pages, tokens, inputs, outputs) if tokens else None

    def _contents(self, steps: StandingSteps, digests: Sequence[bytes]) -> tuple[Rows, ...]:
        """Evidence of the steps as far as it is here without a gap, cut to the rows that stand."""
        found: list[Rows] = []
        for (step, standing), digest in zip(steps, digests, strict=True):
            content = self._find(digest)
            if not content:
                break
            row = len(content) // step.tokens
            # Views: to copy what may be megabytes is left to whoever takes a piece.
            found.append(Rows(step.position, standing, memoryview(content)[: standing * row]))
        return tuple(found)

    def _forget_old(self, client: str, now: float, coming: int) -> None:
        """Forget what is too old, or gone from the cache, and the oldest ones where there are too many.

        Args:
            client: Has no more than its share of them.
            coming: Steps of one that is about to be kept.
        """
        own = [key for key in self._kept if key[0] == client]
        excess = {*own[: max(0, len(own) + 1 - MAX_OF_CLIENT)]}
        steps = coming + sum(len(kept.steps) for kept in self._kept.values())
        for key, kept in list(self._kept.items()):
            is_gone = kept.until < now or not kept.pages.length
            if is_gone or key in excess or len(self._kept) >= MAX_PREFIXES or steps > MAX_STEPS:
                self._cache.drop(kept.pages)
                del self._kept[key]
                steps -= len(kept.steps)


def _continues(opening: Open, former: Open) -> bool:
    """True if the blocks, and what travels, are the same, so that the former's cache and evidence serve."""
    places = [
        (each.revision, each.start, each.stop, each.codec, each.successor is None, each.predecessor is None)
        for each in (opening, former)
    ]
    return places[0] == places[1]


def _stop(steps: Sequence[Rows]) -> int:
    return steps[-1].position + steps[-1].tokens if steps else 0


def _joined(parts: Sequence[Rows], position: int, tokens: int) -> bytes:
    """Rows of `position`, `position + 1`, ... out of contiguous parts that hold them; nothing of no parts."""
    pieces: list[memoryview] = []
    for start, count, content in parts:
        row = len(content) // count
        first, last = max(position - start, 0), min(position + tokens - start, count)
        if first < last:
            pieces.append(content[first * row : last * row])
    return b"".join(pieces)
