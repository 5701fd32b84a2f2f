"""Pings on trio's clock, over hosts in memory."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.swarm import latency as latency_module
from p2pinfer.node.swarm.latency import FIRST_ROUND_S, PEERS_A_ROUND, ROUND_S, Latency
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.coordinates import Coordinate, distance_ms, starting_coordinate

from ..memory import MemoryNetwork


def somebody(peer_id: str, coordinate: Coordinate | None = None) -> Announcement:
    return Announcement(
        peer_id=peer_id,
        model="m",
        revision="0" * 32,
        span=BlockSpan(0, 1),
        dtype="float32",
        tokens_per_s=1.0,
        free_cache_tokens=1,
        sequence=1,
        coordinate=coordinate,
    )


@pytest.fixture
def network(nursery: trio.Nursery) -> MemoryNetwork:
    network = MemoryNetwork(nursery)
    for peer_id in "abc":
        network.host(peer_id)
    return network


async def test_a_round_trip_is_remembered_until_a_ping_fails(network: MemoryNetwork) -> None:
    latency = Latency(network.host("me"), list)
    assert latency.rtt_ms("a") is None
    await latency.measure("a")
    assert latency.rtt_ms("a") == pytest.approx(10.0)
    await network.kill("a")
    await latency.measure("a")
    assert latency.rtt_ms("a") is None


async def test_our_coordinate_moves_towards_what_was_measured(network: MemoryNetwork) -> None:
    theirs = Coordinate(30.0, 0.0, 0.0, 1.0, 0.2)
    latency = Latency(network.host("me"), lambda: [somebody("a", theirs), somebody("b")])
    assert latency.coordinate == starting_coordinate("me")
    await latency.measure("b")
    await latency.measure("c")
    assert latency.coordinate == starting_coordinate("me")
    before = abs(distance_ms(latency.coordinate, theirs) - 10.0)
    for _ in range(20):
        await latency.measure("a")
    assert abs(distance_ms(latency.coordinate, theirs) - 10.0) < before / 2


async def test_few_peers_are_pinged_soon_and_then_now_and_then(
    network: MemoryNetwork, autojump_clock: trio.testing.MockClock
) -> None:
    for index in range(10):
        network.host(f"peer-{index}")
    pinged: list[tuple[float, str]] = []
    me = network.host("me")
    ping = me.ping

    async def note(peer_id: str) -> float:
        pinged.append((trio.current_time(), peer_id))
        return await ping(peer_id)

    me.ping = note  # type: ignore[method-assign]
    latency = Latency(me, list)
    with trio.move_on_after(FIRST_ROUND_S + 2.5 * ROUND_S):
        await latency.serve()
    times = sorted({at for at, _ in pinged})
    assert times == pytest.approx([FIRST_ROUND_S + ROUND_S * n for n in range(3)])
    assert len(pinged) == 3 * PEERS_A_ROUND
    assert "me" not in {peer_id for _, peer_id in pinged}


async def test_what_is_remembered_is_bounded(network: MemoryNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_module, "MAX_REMEMBERED", 2)
    latency = Latency(network.host("me"), list)
    for peer_id in ("a", "b", "c"):
        await latency.measure(peer_id)
    assert [latency.rtt_ms(peer_id) is None for peer_id in "abc"] == [True, False, False]
    network.ping_s = 0.02
    await latency.measure("b")  # again: nobody need be forgotten for it
    assert latency.rtt_ms("b") == pytest.approx(20.0)
    assert latency.rtt_ms("c") == pytest.approx(10.0)
