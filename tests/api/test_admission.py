"""Turns of requests."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.api.admission import Admission
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.errors import ApiError


async def test_some_have_their_turn_some_wait_and_the_rest_are_told_to_come_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    admission = Admission(ApiConfig(requests_per_key=2, queue_per_key=1, queue_timeout_s=30))
    order: list[str] = []

    async def request(name: str, seconds: float) -> None:
        async with admission.turn("key"):
            order.append(name)
            await trio.sleep(seconds)

    async with trio.open_nursery() as nursery:
        for name, seconds in (("a", 10.0), ("b", 20.0), ("c", 1.0)):
            nursery.start_soon(request, name, seconds)
            await trio.testing.wait_all_tasks_blocked()
        assert admission.active == 2
        with pytest.raises(ApiError, match="2 requests are being answered and 1 wait") as raised:
            await request("d", 1)
        assert (raised.value.status, raised.value.retry_after_s) == (429, 5)
        async with admission.turn("another"):
            assert order == ["a", "b"]
    assert order == ["a", "b", "c"]
    assert admission.active == 0


async def test_whoever_waits_too_long_is_told_so_and_leaves_its_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    admission = Admission(ApiConfig(requests_per_key=1, queue_per_key=1, queue_timeout_s=5))
    async with admission.turn("key"):
        for _ in range(2):
            with pytest.raises(ApiError, match="no turn came within 5 s"):
                async with admission.turn("key"):
                    pass
    async with admission.turn("key"):
        pass
