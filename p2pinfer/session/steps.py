"""The steps of a session that are under way, and how far those reach that were answered.

Results come in the order of their steps. After a change of hops the steps without one are sent again, under
the epoch that has begun.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import trio

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.concurrency.turn import Turn
from p2pinfer.node.protocol.wire import Result, Step
from p2pinfer.reputation.receipt import Payload


@dataclass(frozen=True, slots=True)
class Sent:
    """A step that has no result yet."""

    step: Step
    payload: Payload


class Steps:
    """What was sent and what came back; whoever sends and receives tells.

    Attributes:
        turn: Held by a step, or by a change of hops between steps.
        awaited: Those without a result, oldest first.
        length: Positions whose results have come.
        progress_at: When something last came or went.
    """

    def __init__(self) -> None:
        self.turn = Turn()
        self.awaited: deque[Sent] = deque()
        self.length = 0
        self.progress_at = 0.0
        self._begun = trio.Event()
        self._next_number = 0

    @property
    def confirmed(self) -> int:
        """Positions that every hop has in its cache."""
        return self.awaited[0].step.position if self.awaited else self.length

    @property
    def bytes_under_way(self) -> int:
        """Of hidden states whose results have not come."""
        return sum(len(sent.payload) for sent in self.awaited)

    @property
    def may_begin_anew(self) -> bool:
        """Whether they can be sent again: a step that rolls back has undone what the one before it needs."""
        steps = [each.step for each in self.awaited]
        return all(a.position + a.tokens == b.position for a, b in pairwise(steps))

    def begin(self, epoch: int, position: int, tokens: int, returns: int, payload: Payload) -> Sent:
        """Another step is about to be sent."""
        sent = Sent(Step(self._next_number, epoch, position, tokens, returns), payload)
        self._next_number += 1
        if not self.awaited:
            self.progress_at = trio.current_time()
        self.awaited.append(sent)
        self._begun.set()
        return sent

    def begin_anew(self, epoch: int) -> list[Sent]:
        """All that have no result, for another epoch."""
        self.awaited = deque(
            Sent(msgspec.structs.replace(each.step, epoch=epoch), each.payload) for each in self.awaited
        )
        self.progress_at = trio.current_time()
        return [*self.awaited]

    def answer(self, result: Result, peer_id: str) -> Sent:
        """The step that this is the result of, which has come.

        Raises:
            ProtocolViolation: It answers no step, or not the one that is due.
        """
        if not self.awaited:
            raise ProtocolViolation(f"result {result.number}, which nobody asked for", peer_id)
        sent = self.awaited[0]
        step = sent.step
        if (result.number, result.epoch, result.tokens) != (step.number, step.epoch, step.returns):
            raise ProtocolViolation(
                f"result {result.number} with {result.tokens} rows; due is {step.number} with {step.returns}",
                peer_id,
            )
        self.awaited.popleft()
        self.length = step.position + step.tokens
        self.progress_at = trio.current_time()
        return sent

    async def any_awaited(self) -> None:
        """Wait until a step is under way."""
        if not self.awaited:
            self._begun = trio.Event()
            await self._begun.wait()
