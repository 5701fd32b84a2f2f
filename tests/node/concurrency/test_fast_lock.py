"""Order in which tasks get a lock."""

from __future__ import annotations

import trio
import trio.testing

from p2pinfer.node.concurrency.fast_lock import FastLock


async def test_a_turn_that_is_free_is_taken_without_letting_others_run() -> None:
    lock = FastLock()
    ran: list[str] = []

    async def other() -> None:
        ran.append("other")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        async with lock:
            ran.append("first")
        async with lock:
            ran.append("again")
    assert ran == ["first", "again", "other"]


async def test_who_waits_has_it_in_the_order_of_coming_and_before_who_comes_later() -> None:
    lock = FastLock()
    had: list[int] = []

    async def have(number: int) -> None:
        async with lock:
            had.append(number)
            await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        async with lock:
            for number in range(4):
                nursery.start_soon(have, number)
                await trio.testing.wait_all_tasks_blocked()
            assert had == []
        async with lock:
            had.append(4)
    assert had == [0, 1, 2, 3, 4]


async def test_who_is_cancelled_while_waiting_is_passed_over() -> None:
    lock = FastLock()
    had: list[str] = []

    async def have(name: str, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                had.append(name)

    async with trio.open_nursery() as nursery:
        async with lock:
            gone = trio.CancelScope()
            nursery.start_soon(have, "gone", gone)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(have, "patient", trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
            gone.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert had == ["patient"]
        async with lock:
            had.append("last")
    assert had == ["patient", "last"]


async def test_an_error_inside_ends_the_turn() -> None:
    lock = FastLock()
    for _ in range(2):
        try:
            async with lock:
                raise ValueError
        except ValueError:
            pass
    async with lock:
        pass
