import pytest
import trio
import trio.testing

from p2pinfer.node.concurrency.pulse import AutoResetEvent, Pulse


async def test_a_pulse_wakes_all_who_wait_and_nobody_who_comes_later(autojump_clock: trio.abc.Clock) -> None:
    pulse, woken = Pulse(), list[str]()

    async def wait(name: str) -> None:
        await pulse.wait()
        woken.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "a")
        nursery.start_soon(wait, "b")
        await trio.testing.wait_all_tasks_blocked()
        pulse.fire()
        nursery.start_soon(wait, "late")
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(woken) == ["a", "b"]
        nursery.cancel_scope.cancel()


async def test_what_fires_between_a_look_and_the_wait_is_not_missed(autojump_clock: trio.abc.Clock) -> None:
    pulse = Pulse()
    news = pulse.next
    pulse.fire()
    with trio.fail_after(1):
        await news.wait()
    with pytest.raises(trio.TooSlowError), trio.fail_after(1):
        await pulse.wait()


async def test_an_errand_called_before_anybody_waits_is_taken_up_once(autojump_clock: trio.abc.Clock) -> None:
    event = AutoResetEvent()
    event.set()
    event.set()
    with trio.fail_after(1):
        await event.wait()
    with pytest.raises(trio.TooSlowError), trio.fail_after(1):
        await event.wait()


async def test_what_is_called_for_during_the_work_is_for_the_next_time(
    autojump_clock: trio.abc.Clock,
) -> None:
    event = AutoResetEvent()
    event.set()
    await event.wait()
    event.set()  # while its doer is at work
    with trio.fail_after(1):
        await event.wait()
