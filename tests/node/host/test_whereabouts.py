"""Peers are told again by where they were found, not by what they announce."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import cast

import pytest
import trio

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.host.host import Host
from p2pinfer.node.host.whereabouts import LASTS_S, NAMES_A_ROUND, Whereabouts
from p2pinfer.routing.address_ranges import ranges_of_ip
from p2pinfer.routing.announcement import Announcement

from ..memory import MemoryNetwork


def announced(peer_id: str, *addrs: str) -> Announcement:
    return Announcement(peer_id, "m", "a" * 32, BlockSpan(0, 8), "float32", 10.0, 100, 1, addrs=addrs)


@pytest.fixture
async def network() -> AsyncGenerator[MemoryNetwork]:
    async with open_nursery() as nursery:
        yield MemoryNetwork(nursery)


async def test_a_peer_is_where_its_direct_connection_leads_also_when_that_has_ended(
    network: MemoryNetwork,
) -> None:
    host = cast(Host, network.host("client"))
    network.host("peer")
    network.addresses["peer"] = "192.0.2.9"
    whereabouts = Whereabouts(host, list)
    assert whereabouts.found_in("nobody") is None
    assert whereabouts.found_in("peer") == frozenset({"192.0.2.0/24"})
    await network.kill("peer")
    assert whereabouts.found_in("peer") == frozenset({"192.0.2.0/24"})


async def test_behind_a_relay_a_peer_was_not_found_until_it_has_left_it(network: MemoryNetwork) -> None:
    host = cast(Host, network.host("client"))
    network.host("peer")
    network.addresses["peer"] = "2001:db8:7::1"
    network.relayed.add(("client", "peer"))
    whereabouts = Whereabouts(host, list)
    assert whereabouts.found_in("peer") is None
    network.relayed.clear()
    assert whereabouts.found_in("peer") == ranges_of_ip("2001:db8:7::1")


async def test_in_a_local_network_it_was_found_in_no_range_that_means_it(network: MemoryNetwork) -> None:
    host = cast(Host, network.host("client"))
    network.host("peer")
    network.addresses["peer"] = "192.168.1.5"
    assert Whereabouts(host, list).found_in("peer") == frozenset()


async def test_names_are_looked_up_a_few_at_a_time_and_again_when_the_answer_is_old(
    network: MemoryNetwork,
) -> None:
    asked: list[str] = []
    now = 0.0

    async def look_up(name: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        asked.append(name)
        if name == "n00.example":
            raise OSError("no such name")
        return ["192.0.2.66", "10.0.0.1"]

    peers = [announced(f"p{n}", f"/dns4/n{n:02}.example/tcp/1") for n in range(12)]
    peers += [announced("known", "/dns4/known.example/tcp/1", "/ip4/203.0.113.1/tcp/1")]
    whereabouts = Whereabouts(
        cast(Host, network.host("client")), lambda: peers, look_up=look_up, clock=lambda: now
    )
    await whereabouts.look_up()
    assert len(asked) == NAMES_A_ROUND
    await whereabouts.look_up()
    assert len(asked) == 12 and "known.example" not in asked
    await whereabouts.look_up()
    assert len(asked) == 12
    assert whereabouts.named_in(peers[0]) == frozenset()
    assert whereabouts.named_in(peers[1]) == {"192.0.2.0/24", "10.0.0.0/24"}
    assert whereabouts.found_in("p1") is None
    now += LASTS_S
    await whereabouts.look_up()
    assert len(asked) == 12 + NAMES_A_ROUND


async def test_a_name_that_nobody_answers_for_holds_nothing_up(
    network: MemoryNetwork, autojump_clock: trio.testing.MockClock
) -> None:
    async def look_up(name: str) -> list[str]:
        await trio.sleep_forever()
        raise AssertionError

    peers = [announced("p", "/dns4/a.example/tcp/1")]
    whereabouts = Whereabouts(cast(Host, network.host("client")), lambda: peers, look_up=look_up)
    with trio.fail_after(30):
        await whereabouts.look_up()
    assert whereabouts.named_in(peers[0]) == frozenset()
