"""Which steps wait for a result, and which result may come."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.protocol.messages import Result
from p2pinfer.session.in_flight import InFlight


def of(*tokens: int, start: int = 0) -> InFlight:
    """Steps of so many tokens each, one behind the other, none of them answered."""
    steps = InFlight()
    for count in tokens:
        steps.begin(0, start, count, 1, bytes(8 * count))
        start += count
    return steps


async def test_results_come_in_the_order_of_their_steps() -> None:
    steps = of(4, 2)
    assert (steps.confirmed, steps.bytes_under_way) == (0, 48)
    assert steps.answer(Result(0, 0, 1), bytearray(), "a").step.tokens == 4
    assert (steps.confirmed, steps.length, steps.bytes_under_way) == (4, 4, 16)
    assert steps.answer(Result(1, 0, 1), bytearray(), "a").step.position == 4
    assert (steps.confirmed, steps.length, steps.bytes_under_way) == (6, 6, 0)
    with pytest.raises(ProtocolViolation, match="nobody asked for"):
        steps.answer(Result(2, 0, 1), bytearray(), "a")


@pytest.mark.parametrize("result", [Result(1, 0, 1), Result(0, 1, 1), Result(0, 0, 2)])
async def test_a_result_that_is_not_due_leaves_everything_as_it_was(result: Result) -> None:
    steps = of(4, 2)
    with pytest.raises(ProtocolViolation, match="due is 0 with 1") as caught:
        steps.answer(result, bytearray(), "mallory")
    assert caught.value.peer_id == "mallory"
    assert (len(steps.awaited), steps.length) == (2, 0)


async def test_what_has_no_result_begins_anew_under_another_epoch() -> None:
    steps = of(4, 2, 1)
    steps.answer(Result(0, 0, 1), bytearray(), "a")
    assert [(sent.step.number, sent.step.epoch) for sent in steps.begin_anew(3)] == [(1, 3), (2, 3)]
    with pytest.raises(ProtocolViolation):
        steps.answer(Result(1, 0, 1), bytearray(), "a")
    steps.answer(Result(1, 3, 1), bytearray(), "a")
    assert steps.length == 6


async def test_a_step_that_rolls_back_cannot_be_sent_again_with_the_one_before() -> None:
    steps = of(4, 2)
    assert steps.may_begin_anew
    steps.begin(0, 5, 1, 1, b"")
    assert not steps.may_begin_anew
    steps.answer(Result(0, 0, 1), bytearray(), "a")
    steps.answer(Result(1, 0, 1), bytearray(), "a")
    assert steps.may_begin_anew


async def test_the_time_counts_from_when_something_came_or_went(
    autojump_clock: trio.testing.MockClock,
) -> None:
    steps = of(4)
    began_at = steps.progress_at
    await trio.sleep(5)
    steps.begin(0, 4, 1, 1, b"")
    assert steps.progress_at == began_at  # somebody has kept the first one for so long
    steps.answer(Result(0, 0, 1), bytearray(), "a")
    assert steps.progress_at == began_at + 5


async def test_whoever_waits_for_a_step_is_told_of_the_next() -> None:
    steps = InFlight()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(steps.any_awaited)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        steps.begin(0, 0, 1, 1, b"")
    await steps.any_awaited()


async def test_whoever_waits_for_a_step_gets_its_result() -> None:
    steps = InFlight()
    sent = steps.begin(0, 0, 1, 1, b"")
    steps.answer(Result(0, 0, 1), bytearray(b"rows"), "a")
    answer = await sent.promise.wait()
    assert (bytes(answer.payload), answer.peer_id) == (b"rows", "a")


async def test_what_is_rolled_back_is_not_awaited_and_a_step_before_it_is() -> None:
    steps = of(4, 2, 2)
    kept, *dropped = steps.awaited
    steps.drop_from(5, LookupError("rolled back"))  # within the second step
    assert [*steps.awaited] == [kept, dropped[0]]
    steps.drop_from(4, LookupError("rolled back"))
    assert [*steps.awaited] == [kept]
    for sent in dropped:
        with pytest.raises(LookupError):
            await sent.promise.wait()
    assert [steps.is_awaited(Result(number, 0, 1)) for number in range(3)] == [True, False, False]
    steps.answer(Result(0, 0, 1), bytearray(), "a")
    assert (steps.length, steps.confirmed) == (4, 4)


async def test_quiet_begins_when_the_last_result_has_come_and_holds_steps_back() -> None:
    steps = of(4)
    order: list[str] = []

    async def be_quiet() -> None:
        async with steps.quiescent():
            order.append("quiet")
            await trio.testing.wait_all_tasks_blocked()
            order.append("loud")

    async def send() -> None:
        async with steps.lock:
            order.append("send")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_quiet)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        steps.answer(Result(0, 0, 1), bytearray(), "a")
    assert order == ["quiet", "loud", "send"]


async def test_a_repair_comes_before_quiet_that_would_wait_for_it() -> None:
    steps = of(4)
    order: list[str] = []

    async def be_quiet() -> None:
        async with steps.quiescent():
            order.append("quiet")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_quiet)
        await trio.testing.wait_all_tasks_blocked()
        async with steps.repairing():
            order.append("repair")
            steps.begin_anew(1)
            steps.answer(Result(0, 1, 1), bytearray(), "a")
    assert order == ["repair", "quiet"]
