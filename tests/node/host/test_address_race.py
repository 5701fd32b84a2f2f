"""Racing the addresses of a peer."""

from __future__ import annotations

from functools import partial

import trio
import trio.testing

from p2pinfer.node.concurrency.nurseries import innermost
from p2pinfer.node.host.address_race import race
from p2pinfer.node.host.dial import Dial
from p2pinfer.routing.announcement import MAX_ADDRS


async def test_addresses_are_tried_in_order_until_one_answers(autojump_clock: trio.testing.MockClock) -> None:
    started: list[tuple[float, str]] = []
    began = trio.current_time()

    async def attempt(address: str) -> None:
        started.append((trio.current_time() - began, address))
        if address == "refuses":
            raise OSError("refused")
        await trio.sleep({"silent": 1000, "slow": 0.25, "late": 1000}[address])

    errors: dict[str, Exception] = {}
    await race(["refuses", "silent", "slow", "late"], attempt, 0.1, errors)
    assert started == [(0.0, "refuses"), (0.0, "silent"), (0.1, "slow"), (0.2, "late")]
    assert trio.current_time() - began == 0.35
    assert list(errors) == ["refuses"]


async def test_all_errors_are_told_when_nobody_answers(autojump_clock: trio.testing.MockClock) -> None:
    async def attempt(address: str) -> None:
        await trio.sleep(5)
        raise OSError(address)

    errors: dict[str, Exception] = {}
    await race(["a", "b"], attempt, 0.1, errors)
    assert {address: str(error) for address, error in errors.items()} == {"a": "a", "b": "b"}


def test_the_innermost_reason_is_found() -> None:
    try:
        try:
            raise ExceptionGroup("several", [ValueError("the reason"), ValueError("another")])
        except ExceptionGroup as exc:
            raise OSError("outer") from exc
    except OSError as exc:
        assert innermost(exc) == "the reason"
    assert innermost(KeyError()) == "KeyError"


async def test_an_address_that_becomes_known_meanwhile_is_tried_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The former address swallows what is sent to it, as that of a line that has got another one does."""
    heard, more = trio.open_memory_channel[str](1)
    tried: list[tuple[str, float]] = []

    async def attempt(address: str) -> None:
        tried.append((address, trio.current_time()))
        if address == "former":
            await trio.sleep_forever()

    began_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(race, ["former"], attempt, 0.1, {}, more=more))
        await trio.sleep(3.0)
        heard.send_nowait("present")
    assert trio.current_time() - began_at < 3.1
    assert [address for address, _ in tried] == ["former", "present"]


async def test_a_race_whose_last_address_has_failed_waits_for_no_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    _heard, more = trio.open_memory_channel[str](1)
    errors: dict[str, Exception] = {}

    async def attempt(address: str) -> None:
        raise OSError(address)

    with trio.fail_after(10):
        await race(["a"], attempt, 0.1, errors, detours=["b"], head_start_s=0.5, more=more)
    assert set(errors) == {"a", "b"}


def test_a_dial_takes_in_each_address_once_and_no_more_than_there_is_room_for() -> None:
    dial = Dial(frozenset({"a"}))
    dial.add(["a", "b", "b"])
    dial.add([f"c{number}" for number in range(100)])
    assert dial.more.statistics().current_buffer_used == MAX_ADDRS
    assert len(dial.addrs) == 1 + MAX_ADDRS
