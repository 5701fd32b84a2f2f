"""Racing the addresses of a peer."""

from __future__ import annotations

import trio
import trio.testing

from p2pinfer.node.concurrency.nurseries import innermost
from p2pinfer.node.host.address_race import race


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
