"""Which steps are taken in and which are superseded, against the definition of both, spelt out."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.protocol.messages import Step
from p2pinfer.node.serve.inbox import Inbox

MOST_STEPS, MOST_BYTES, MAX_TOKENS, ROW = 4, 96, 20, 8
CONFIG = ServeConfig(max_steps_in_flight=MOST_STEPS, max_bytes_in_flight=MOST_BYTES, max_chunk_tokens=6)


class Definition:
    """The same by brute force: everything that ever came is kept, and every pair is compared."""

    def __init__(self) -> None:
        self.taken: list[Step] = []
        self.left = 0

    def allows(self, step: Step) -> bool:
        former = self.taken[-1] if self.taken else Step(0, 0, 0, 1, 0)
        follows_from = former.position + former.tokens if self.taken else 0
        in_flight = self.taken[self.left :]
        return (
            step.epoch >= former.epoch
            and step.position <= follows_from
            and step.position + step.tokens <= MAX_TOKENS
            and step.tokens <= CONFIG.max_chunk_tokens
            and step.returns <= step.tokens
            and len(in_flight) < MOST_STEPS
            and sum(each.tokens for each in [*in_flight, step]) * ROW <= MOST_BYTES
        )

    def superseded(self) -> list[bool]:
        """Of each step in flight: whether one that raised the epoch later began at or before it."""
        epochs = [0, *(each.epoch for each in self.taken)]
        raisers = [index for index, each in enumerate(self.taken) if each.epoch > epochs[index]]
        return [
            any(later > index and self.taken[later].position <= step.position for later in raisers)
            for index, step in enumerate(self.taken)
            if index >= self.left
        ]


steps = st.tuples(
    st.integers(0, 2),  # how much the epoch rises
    st.integers(-6, 1),  # where it begins, from where the last one ended
    st.integers(1, 7),
    st.integers(0, 7),
)


@given(st.lists(st.none() | steps, max_size=40))
def test_what_is_taken_in_and_what_is_superseded_is_as_defined(
    actions: list[tuple[int, int, int, int] | None],
) -> None:
    """Steps come, and the oldest one leaves where there is None."""
    inbox, definition = Inbox(MAX_TOKENS, CONFIG), Definition()
    waiting: deque[Step] = deque()
    for number, action in enumerate(actions):
        if action is None:
            if waiting:
                inbox.let_go(waiting.popleft().tokens * ROW)
                definition.left += 1
            continue
        rise, offset, tokens, returns = action
        former = definition.taken[-1] if definition.taken else Step(0, 0, 0, 1, 0)
        end = former.position + former.tokens if definition.taken else 0
        step = Step(number, former.epoch + rise, max(0, end + offset), tokens, returns)
        if definition.allows(step):
            inbox.take(step, tokens * ROW, "a")
            definition.taken.append(step)
            waiting.append(step)
        else:
            with pytest.raises(ProtocolViolation) as caught:
                inbox.take(step, tokens * ROW, "a")
            assert caught.value.peer_id == "a"
        assert inbox.in_flight == len(waiting)
        assert [inbox.is_superseded(each) for each in waiting] == definition.superseded()


def test_an_epoch_may_not_fall() -> None:
    inbox = Inbox(MAX_TOKENS, CONFIG)
    inbox.take(Step(0, 2, 0, 1, 0), ROW, "a")
    with pytest.raises(ProtocolViolation, match="step 1 is of epoch 1 after 2"):
        inbox.take(Step(1, 1, 1, 1, 0), ROW, "a")


def test_a_roll_back_is_forgotten_when_all_it_could_concern_has_left() -> None:
    inbox = Inbox(MAX_TOKENS, CONFIG)
    first, second = Step(0, 0, 0, 4, 0), Step(1, 1, 2, 1, 0)
    for step in (first, second):
        inbox.take(step, ROW, "a")
    late = Step(2, 0, 3, 1, 0)
    assert [inbox.is_superseded(step) for step in (first, second, late)] == [False, False, True]
    for _ in range(2):
        inbox.let_go(ROW)
    assert not inbox.is_superseded(late)


def test_nothing_is_wanted_of_a_spoilt_session() -> None:
    inbox = Inbox(MAX_TOKENS, CONFIG)
    step = Step(0, 0, 0, 1, 0)
    inbox.take(step, ROW, "a")
    inbox.saw_nonfinite = True
    assert inbox.is_superseded(step)
