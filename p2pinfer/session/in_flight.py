"""Steps in flight, and the position up to which results have arrived.

Results come in the order of their steps. After a change of hops the steps without one are sent again, under
the epoch that has begun; after a roll-back those behind it are dropped, and so are their results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import NamedTuple

import msgspec
import trio

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.concurrency.fast_lock import FastLock
from p2pinfer.node.protocol.messages import Result, Step
from p2pinfer.reputation.receipt import Payload


class Answer(NamedTuple):
    """A result, the hidden states that came with it, and the hop that sent them."""

    result: Result
    payload: bytearray
    peer_id: str


class Promise:
    """An answer that is still to come."""

    __slots__ = ("_answer", "_error", "_settled")

    def __init__(self) -> None:
        self._answer: Answer | None = None
        self._error: Exception | None = None
        self._settled = trio.Event()

    @property
    def is_settled(self) -> bool:
        """True if waiting would return or raise at once."""
        return self._settled.is_set()

    def keep(self, answer: Answer) -> None:
        """Hand the answer to whoever waits."""
        self._answer = answer
        self._settled.set()

    def fail(self, error: Exception) -> None:
        """Raise `error` in whoever waits, unless the answer has come."""
        if not self._settled.is_set():
            self._error = error
            self._settled.set()

    async def wait(self) -> Answer:
        """The answer; raises what `fail` was given."""
        await self._settled.wait()
        if self._answer is None:
            assert self._error is not None
            raise self._error
        return self._answer


class SentStep(NamedTuple):
    """A step that has no result yet."""

    step: Step
    payload: Payload
    promise: Promise


class InFlight:
    """The steps that were sent and not answered; whoever sends and receives tells.

    Attributes:
        lock: Held while a step goes out, and while hops change.
        awaited: Steps without a result, oldest first.
        length: Positions whose results have come.
        progress_at: When something last came or went.
        takes_results: False while hops are being replaced: what is replayed to new ones, up to `confirmed`,
            has to be what steps that are sent again go on from.
    """

    def __init__(self) -> None:
        self.lock = FastLock()
        self.awaited: deque[SentStep] = deque()
        self.length = 0
        self.progress_at = 0.0
        self.takes_results = True
        self._begun = trio.Event()
        self._calm = trio.Event()  # no step is in flight, or a repair is due
        self._repair_due = False
        self._next_number = 0

    @property
    def confirmed(self) -> int:
        """Positions that every hop has in its cache."""
        # Not `length` plus what was sent: of a step without a result nobody knows how far it came, so a
        # repair replays up to it and sends it again.
        return self.awaited[0].step.position if self.awaited else self.length

    @property
    def bytes_under_way(self) -> int:
        """Bytes of hidden states whose results have not come."""
        return sum(len(sent.payload) for sent in self.awaited)

    @property
    def may_begin_anew(self) -> bool:
        """True if they can be sent again: a step that rolls back has undone what the one before it needs."""
        steps = [each.step for each in self.awaited]
        return all(a.position + a.tokens == b.position for a, b in pairwise(steps))

    def begin(
        self, epoch: int, position: int, tokens: int, returns: int, payload: Payload, *, kept: bool = False
    ) -> SentStep:
        """Register a step that is about to be sent; of one that hops have `kept`, its payload does not go."""
        # A number is never used twice, not even after a roll-back: a late result of a dropped step is told by
        # it.
        step = Step(self._next_number, epoch, position, tokens, returns, kept=kept)
        sent = SentStep(step, payload, Promise())
        self._next_number += 1
        if not self.awaited:
            self.progress_at = trio.current_time()
        self.awaited.append(sent)
        self._begun.set()
        return sent

    def begin_anew(self, epoch: int) -> list[SentStep]:
        """All steps that have no result, for another epoch."""
        # The promises stay: whoever waits for a step sees a pause, and not that it was sent twice. What hops
        # have kept travels now, for one that has joined has not.
        self.awaited = deque(
            SentStep(msgspec.structs.replace(each.step, epoch=epoch, kept=False), each.payload, each.promise)
            for each in self.awaited
        )
        self.progress_at = trio.current_time()
        self.takes_results = True  # those of the new epoch
        return [*self.awaited]

    def drop_from(self, position: int, error: Exception) -> None:
        """Await no result of a step that begins at `position` or later; whoever does gets `error`."""
        while self.awaited and self.awaited[-1].step.position >= position:
            self.awaited.pop().promise.fail(error)
        self.length = min(self.length, position)
        self._note_calm()

    def fail_all(self, error: Exception) -> None:
        """Await nothing any more; whoever does gets `error`."""
        self.drop_from(0, error)

    def is_awaited(self, result: Result) -> bool:
        """True if a step of this number and epoch is in flight: a result of one that was dropped is late."""
        return any(
            (each.step.number, each.step.epoch) == (result.number, result.epoch) for each in self.awaited
        )

    def answer(self, result: Result, payload: bytearray, peer_id: str) -> SentStep:
        """Settle the step that this is the result of, which is the oldest in flight.

        Raises:
            ProtocolViolation: It answers no step, or not the one that is due.
        """
        if not self.awaited:
            raise ProtocolViolation(f"result {result.number}, which nobody asked for", peer_id)
        sent = self.awaited[0]
        step = sent.step
        # Only the oldest can be due: hops compute the steps of a session in order, and links keep that order.
        # To look the number up instead would let a hop skip a step, and `length` would count positions that
        # were never computed. The epoch has to fit as well, since after a repair the same number goes out
        # again.
        if (result.number, result.epoch, result.tokens) != (step.number, step.epoch, step.returns):
            raise ProtocolViolation(
                f"result {result.number} with {result.tokens} rows; due is {step.number} with {step.returns}",
                peer_id,
            )
        self.awaited.popleft()
        self.length = step.position + step.tokens
        self.progress_at = trio.current_time()
        sent.promise.keep(Answer(result, payload, peer_id))
        self._note_calm()
        return sent

    async def any_awaited(self) -> None:
        """Wait until a step is in flight."""
        if not self.awaited:
            self._begun = trio.Event()
            await self._begun.wait()

    @asynccontextmanager
    async def quiescent(self) -> AsyncGenerator[None]:
        """Let no step be in flight inside, nor begin.

        A repair comes first: the results that are waited for here may not come without it, and it needs the
        lock that is held meanwhile.
        """
        while True:
            async with self.lock:
                while self.awaited and not self._repair_due:
                    self._calm = trio.Event()
                    await self._calm.wait()
                # Else a repair is due: this lets go of the lock, which the repair needs, and asks for it
                # anew.
                if not self.awaited:
                    yield
                    return

    @asynccontextmanager
    async def repairing(self) -> AsyncGenerator[None]:
        """Hold the lock, ahead of everybody who waits for steps in flight to come back."""
        self._repair_due = True
        self._calm.set()
        async with self.lock:
            self._repair_due = False
            self.takes_results = False
            try:
                yield
            finally:
                self.takes_results = True

    def _note_calm(self) -> None:
        if not self.awaited:
            self._calm.set()
