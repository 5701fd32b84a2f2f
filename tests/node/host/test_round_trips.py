"""Deadlines that move when it turns out how far a peer is."""

from __future__ import annotations

import math

import trio
import trio.testing

from p2pinfer.node.host.round_trips import RoundTrips
from p2pinfer.node.transport.line_rate import MAX_RTT_S


async def took_s(round_trips: RoundTrips, base_s: float, *peer_ids: str) -> float:
    began_at = trio.current_time()
    with round_trips.within(base_s, peer_ids, 10) as scope:
        await trio.sleep_forever()
    assert scope.cancelled_caught
    return trio.current_time() - began_at


async def test_a_deadline_follows_the_farthest_of_the_peers(autojump_clock: trio.testing.MockClock) -> None:
    round_trips = RoundTrips()
    assert math.isclose(await took_s(round_trips, 15, "a", "b"), 15)
    round_trips.note("a", 0.1)
    round_trips.note("b", 1.6)
    assert math.isclose(await took_s(round_trips, 15, "a", "b"), 31)
    assert math.isclose(await took_s(round_trips, 15, "a", "c"), 16)


async def test_what_is_found_out_meanwhile_moves_it(autojump_clock: trio.testing.MockClock) -> None:
    round_trips = RoundTrips()
    found: list[float] = []

    async def wait() -> None:
        found.append(await took_s(round_trips, 15, "a"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.sleep(14)
        round_trips.note("stranger", 5.0)
        round_trips.note("a", 0.8)
    assert math.isclose(found[0], 23)


async def test_a_peer_cannot_keep_us_waiting_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    round_trips = RoundTrips()
    round_trips.note("a", 1e9)
    assert math.isclose(await took_s(round_trips, 15, "a"), 15 + 10 * MAX_RTT_S)
