"""Errands for fraud proofs: proofs to be fetched, each by one notice at a time, and who else told of them.

Anybody may publish a notice of anybody's proof, in front of its author's own, and say in it that the proof is
about somebody else, or smaller, or to be had where it is not. So a few notices by other authors stand by
until the proof was looked at. One that leads nowhere makes room for the next; only where none is left is the
proof forgotten, for a later notice to bring.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

import trio

from p2pinfer.node.concurrency.turn_queue import TurnQueue
from p2pinfer.recent import Recent

MAX_REMEMBERED: Final = 4096  # proofs
RETRIES_S: Final = (0.5, 2.0, 5.0, 15.0)  # between rounds: a neighbour may be fetching it just now
MAX_RETRYING: Final = 64  # notices that wait for their next round
STANDING_BY: Final = 3  # notices of one proof, beside the one that is followed

_Notice = TypeVar("_Notice")


@dataclass(frozen=True, slots=True)
class Errand(Generic[_Notice]):
    """A proof to be fetched.

    Attributes:
        proof: Its content address.
        author: Who published the notice.
        bringer: Peer in whose places of the queue it waits.
        round: How often nobody had all of it.
        is_paid: Its bytes have been counted.
    """

    notice: _Notice
    proof: bytes
    author: str
    bringer: str
    round: int = 0
    is_paid: bool = False


class Errands(Generic[_Notice]):
    """Queue of errands, each bringer's in turn."""

    def __init__(self) -> None:
        self._known = Recent[bytes, None](MAX_REMEMBERED)
        self._authors: dict[bytes, set[str]] = {}  # by proof that is followed: whose notices were taken in
        self._standing_by: dict[bytes, list[Errand[_Notice]]] = {}
        self._waiting = TurnQueue[Errand[_Notice]]()
        self._retrying = 0

    def remember(self, proof: bytes) -> None:
        """Take in no notice of a proof any more."""
        self._known[proof] = None

    def has_use_for(self, proof: bytes, author: str) -> bool:
        """True if a proof was not looked at yet, and neither this author nor several others told of it."""
        if proof not in self._known:
            return True
        authors = self._authors.get(proof)
        return authors is not None and author not in authors and len(authors) <= STANDING_BY

    def put(self, errand: Errand[_Notice]) -> bool:
        """Take in an errand that there is a use for; False if there is no place for it."""
        proof = errand.proof
        if proof in self._known and proof in self._authors:
            self._authors[proof].add(errand.author)
            self._standing_by.setdefault(proof, []).append(errand)
            return True
        if not self._waiting.put(errand.bringer, errand):
            return False
        self.remember(proof)
        self._authors[proof] = {errand.author}
        return True

    def look_again(self, errand: Errand[_Notice]) -> None:
        """Have a proof looked at that is here already."""
        self._waiting.put(errand.bringer, errand)

    async def get(self) -> Errand[_Notice]:
        """The next errand, as soon as there is one."""
        return await self._waiting.get()

    def done(self, errand: Errand[_Notice]) -> None:
        """Follow no other notice of a proof: it was looked at."""
        self._authors.pop(errand.proof, None)
        self._standing_by.pop(errand.proof, None)

    def note_in_vain(self, errand: Errand[_Notice], nursery: trio.Nursery, *, again: bool) -> None:
        """Go on with the next notice of a proof after one led nowhere.

        Args:
            again: True if this one is worth another round, after a pause.
        """
        others = self._standing_by.setdefault(errand.proof, [])
        if again and errand.round < len(RETRIES_S):
            others.append(replace(errand, round=errand.round + 1))
        while others:
            following = others.pop(0)
            if not following.round and self._waiting.put(following.bringer, following):
                return
            if following.round and self._retrying < MAX_RETRYING:
                self._retrying += 1
                nursery.start_soon(self._put_later, following, nursery)
                return
        self.done(errand)
        self._known.pop(errand.proof, None)  # another one may bring it

    async def _put_later(self, errand: Errand[_Notice], nursery: trio.Nursery) -> None:
        """Have one more round made for a proof that nobody had, while others are seen to."""
        try:
            await trio.sleep(RETRIES_S[errand.round - 1])
        finally:
            self._retrying -= 1
        if not self._waiting.put(errand.bringer, errand):
            self.note_in_vain(errand, nursery, again=False)
