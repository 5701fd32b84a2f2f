"""Which steps wait for a result, and which result may come."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.protocol.wire import Result
from p2pinfer.session.steps import Steps


def of(*tokens: int, start: int = 0) -> Steps:
    """Steps of so many tokens each, one behind the other, none of them answered."""
    steps = Steps()
    for count in tokens:
        steps.begin(0, start, count, 1, bytes(8 * count))
        start += count
    return steps


async def test_results_come_in_the_order_of_their_steps() -> None:
    steps = of(4, 2)
    assert (steps.confirmed, steps.bytes_under_way) == (0, 48)
    assert steps.answer(Result(0, 0, 1), "a").step.tokens == 4
    assert (steps.confirmed, steps.length, steps.bytes_under_way) == (4, 4, 16)
    assert steps.answer(Result(1, 0, 1), "a").step.position == 4
    assert (steps.confirmed, steps.length, steps.bytes_under_way) == (6, 6, 0)
    with pytest.raises(ProtocolViolation, match="nobody asked for"):
        steps.answer(Result(2, 0, 1), "a")


@pytest.mark.parametrize("result", [Result(1, 0, 1), Result(0, 1, 1), Result(0, 0, 2)])
async def test_a_result_that_is_not_due_leaves_everything_as_it_was(result: Result) -> None:
    steps = of(4, 2)
    with pytest.raises(ProtocolViolation, match="due is 0 with 1") as caught:
        steps.answer(result, "mallory")
    assert caught.value.peer_id == "mallory"
    assert (len(steps.awaited), steps.length) == (2, 0)


async def test_what_has_no_result_begins_anew_under_another_epoch() -> None:
    steps = of(4, 2, 1)
    steps.answer(Result(0, 0, 1), "a")
    assert [(sent.step.number, sent.step.epoch) for sent in steps.begin_anew(3)] == [(1, 3), (2, 3)]
    with pytest.raises(ProtocolViolation):
        steps.answer(Result(1, 0, 1), "a")
    steps.answer(Result(1, 3, 1), "a")
    assert steps.length == 6


async def test_a_step_that_rolls_back_cannot_be_sent_again_with_the_one_before() -> None:
    steps = of(4, 2)
    assert steps.may_begin_anew
    steps.begin(0, 5, 1, 1, b"")
    assert not steps.may_begin_anew
    steps.answer(Result(0, 0, 1), "a")
    steps.answer(Result(1, 0, 1), "a")
    assert steps.may_begin_anew


async def test_the_time_counts_from_when_something_came_or_went(
    autojump_clock: trio.testing.MockClock,
) -> None:
    steps = of(4)
    began_at = steps.progress_at
    await trio.sleep(5)
    steps.begin(0, 4, 1, 1, b"")
    assert steps.progress_at == began_at  # somebody has kept the first one for so long
    steps.answer(Result(0, 0, 1), "a")
    assert steps.progress_at == began_at + 5


async def test_whoever_waits_for_a_step_is_told_of_the_next() -> None:
    steps = Steps()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(steps.any_awaited)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        steps.begin(0, 0, 1, 1, b"")
    await steps.any_awaited()
