"""When it is tried to leave a relay: the client's streams and the links between hops keep the same times."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import trio
import trio.testing

from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.relay_upgrade import (
    DIRECT_LOOK_S,
    LOOK_S,
    MOVE_S,
    PROMPT_ROUND_TRIPS,
    PROMPT_S,
    is_worth_moving,
    leave_relays,
    note_moved,
)
from p2pinfer.node.transport import line_rate

from ..memory import MemoryNetwork


@dataclass(eq=False)
class Line:
    peer_id: str
    is_relayed: bool = True


async def tries(host: Network, lines: list[Line], *, for_s: float, succeed: bool) -> list[tuple[str, float]]:
    """Who is tried to be moved within so many seconds, and when."""
    tried: list[tuple[str, float]] = []

    async def move(line: Line) -> bool:
        await trio.lowlevel.checkpoint()
        tried.append((line.peer_id, trio.current_time()))
        line.is_relayed = not succeed
        return succeed

    with trio.move_on_after(for_s):
        await leave_relays(host, lambda: lines, move)
    return tried


async def test_what_is_relayed_moves_at_once_when_there_is_a_direct_connection(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = MemoryNetwork(nursery)
    host = network.host("client")
    for name in "abc":
        network.host(name)
    network.relayed = {("client", "b")}
    lines = [Line("a"), Line("b"), Line("c", is_relayed=False), Line("gone")]
    assert [name for name, _ in await tries(host, lines, for_s=3, succeed=True)] == ["a"]
    network.relayed.clear()
    began = trio.current_time()
    [(name, at)] = await tries(host, lines, for_s=3, succeed=True)
    assert name == "b"
    assert at - began == pytest.approx(LOOK_S)


async def test_one_that_cannot_be_moved_is_tried_again_after_a_pause_and_another_in_its_place_sooner(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = MemoryNetwork(nursery)
    host = network.host("client")
    for name in "ab":
        network.host(name)
    lines = [Line("a")]
    times = [at for _, at in await tries(host, lines, for_s=3 * MOVE_S, succeed=False)]
    assert len(times) > 1
    assert all(later - former >= MOVE_S for former, later in pairwise(times))

    async def replace() -> None:
        await trio.sleep(1)
        lines[0] = Line("b")

    began = trio.current_time()
    nursery.start_soon(replace)
    tried = await tries(host, lines, for_s=3, succeed=False)
    assert [name for name, _ in tried] == ["a", "b"]
    assert tried[1][1] - began <= 1 + 3 * LOOK_S


async def test_a_move_is_counted_with_how_long_nothing_went_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        host = MemoryNetwork(nursery).host("a")
        began_at = trio.current_time()
        await trio.sleep(2)
        assert note_moved(host, "b", began_at) == pytest.approx(2)
        assert host.counts.total("upgrades") == 1


async def test_a_prompt_goes_through_before_its_stream_moves_unless_it_is_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began = trio.current_time()
    near, far = line_rate.Line(rtt_s=0.1), line_rate.Line(rtt_s=1.6)
    assert is_worth_moving(None, far)
    assert not is_worth_moving(began, near)
    await trio.sleep(PROMPT_S + 0.1 * PROMPT_ROUND_TRIPS)
    assert is_worth_moving(began, near)
    assert not is_worth_moving(began, far)
    await trio.sleep(1.5 * PROMPT_ROUND_TRIPS)
    assert is_worth_moving(began, far)
    assert is_worth_moving(began - 100, line_rate.Line(rtt_s=1e9))  # by what the peer says


async def test_direct_lines_are_looked_at_rarely_and_one_that_becomes_relayed_moves_soon(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    network = MemoryNetwork(nursery)
    host = network.host("client")
    network.host("a")
    line, looks, moved_at = Line("a", is_relayed=False), list[float](), list[float]()

    def lines() -> list[Line]:
        looks.append(trio.current_time())
        return [line]

    async def move(line: Line) -> bool:
        await trio.lowlevel.checkpoint()
        moved_at.append(trio.current_time())
        line.is_relayed = False
        return True

    nursery.start_soon(leave_relays, host, lines, move)
    await trio.sleep(20)
    assert len(set(looks)) <= 20 / DIRECT_LOOK_S + 1
    line.is_relayed, began_at = True, trio.current_time()
    await trio.sleep(DIRECT_LOOK_S + LOOK_S)
    assert [at - began_at <= DIRECT_LOOK_S for at in moved_at] == [True]
