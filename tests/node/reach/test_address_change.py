"""A router that gets another public address: how soon the host behind it knows. Simulated time."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
import trio.testing

from p2pinfer.node.host.host import Host
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.reach import own_addresses
from p2pinfer.node.reach import reach as reach_module
from p2pinfer.node.reach.observers import ROUND_S, SCOUT_S
from p2pinfer.node.reach.reach import Reach
from p2pinfer.node.reach.reachability import Observation

OLD, NEW = "11.0.3.1", "11.0.3.77"
NEIGHBOURS = [f"neighbour{number}" for number in range(4)]
PROMISED_S = 10.0  # for knowing it, of which announcing takes a few tenths


class Network:
    """No connection at all."""

    def __init__(self) -> None:
        self.connections: dict[str, list[Any]] = {}


class Libp2p:
    def __init__(self) -> None:
        self.network = Network()

    def get_network(self) -> Network:
        return self.network


class StandIn:
    """What `Reach` wants of a host, whose peers come and go by the test's word."""

    peer_id = "us"
    listening = ("/ip4/0.0.0.0/tcp/4001",)
    announced = ()
    addrs = ()

    def __init__(self) -> None:
        self.libp2p = Libp2p()
        self.outside: tuple[str, ...] = ()
        self._peers: list[str] = []
        self._up: list[Callable[[str], None]] = []
        self._down: list[Callable[[str], None]] = []

    def when_connected(self, callback: Callable[[str], None]) -> None:
        self._up.append(callback)

    def when_disconnected(self, callback: Callable[[str], None]) -> None:
        self._down.append(callback)

    def connected_peers(self) -> list[str]:
        return [*self._peers]

    def connection_kind(self, peer_id: str) -> str:
        return "direct"

    def be_reached_at(self, addrs: tuple[str, ...]) -> None:
        self.outside = tuple(addrs)

    def be_reached_through(self, addrs: object) -> None: ...
    def serve(self, *_: object) -> None: ...
    def when_relayed(self, *_: object) -> None: ...

    def join(self, peer_id: str) -> None:
        self._peers.append(peer_id)
        for callback in self._up:
            callback(peer_id)

    def leave(self, peer_id: str) -> None:
        self._peers.remove(peer_id)
        for callback in self._down:
            callback(peer_id)


def no_addresses(kind: str) -> list[str]:
    return []


class World:
    """The host, and the address that everybody outside sees it at."""

    def __init__(self, host: StandIn, reach: Reach) -> None:
        self.host = host
        self.reach = reach
        self.ip = OLD
        self.asks: list[tuple[float, str]] = []

    async def ask(self, host: Host, peer_id: str, ports: tuple[int, ...]) -> Observation:
        self.asks.append((trio.current_time(), peer_id))
        await trio.sleep(0.05)
        return Observation(peer_id, self.ip, 4001, 4001, ports)

    async def learnt_s(self, within_s: float) -> float:
        """Seconds from now until the host tells others of its new address."""
        began_at = trio.current_time()
        with trio.move_on_after(within_s):
            while self.host.outside != (f"/ip4/{NEW}/tcp/4001",):
                await trio.sleep(0.1)
        return trio.current_time() - began_at


@asynccontextmanager
async def settled(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[World]:
    """A host whose four neighbours have told it where it is reached."""
    host = StandIn()
    found = Reach(cast(Any, host), HostConfig(upnp=False, relays=0, punch=False), None, lambda: [])
    world = World(host, found)
    monkeypatch.setattr(reach_module, "ask", world.ask)
    monkeypatch.setattr(own_addresses, "machine_addresses", no_addresses)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.serve)
        for peer_id in NEIGHBOURS:
            host.join(peer_id)
        await trio.sleep(45)
        assert host.outside == (f"/ip4/{OLD}/tcp/4001",)
        yield world
        nursery.cancel_scope.cancel()


async def visitors(host: StandIn, every_s: float) -> None:
    number = 0
    while True:
        await trio.sleep(every_s - 1)
        number += 1
        host.join(f"visitor{number}")
        await trio.sleep(1)
        host.leave(f"visitor{number}")


async def all_are_lost_and_come_again(world: World) -> None:
    for peer_id in NEIGHBOURS:
        world.host.leave(peer_id)
    await trio.sleep(3)
    for peer_id in NEIGHBOURS:
        world.host.join(peer_id)


async def one_is_lost_and_comes_again(world: World) -> None:
    world.host.leave(NEIGHBOURS[2])
    await trio.sleep(1)
    world.host.join(NEIGHBOURS[2])


async def others_come_in_their_place(world: World) -> None:
    for peer_id in NEIGHBOURS:
        world.host.leave(peer_id)
    await trio.sleep(3)
    world.host.join("stranger")


@pytest.mark.parametrize("every_s", [30, 120, 299, 600])
@pytest.mark.parametrize(
    "breaks", [all_are_lost_and_come_again, one_is_lost_and_comes_again, others_come_in_their_place]
)
async def test_a_new_address_is_told_within_10_s_however_often_visitors_come(
    every_s: float,
    breaks: Callable[[World], Awaitable[None]],
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with settled(monkeypatch) as world, trio.open_nursery() as nursery:
        nursery.start_soon(visitors, world.host, every_s)
        world.ip = NEW
        began_at = trio.current_time()
        await breaks(world)
        await world.learnt_s(600)
        assert trio.current_time() - began_at < PROMISED_S
        nursery.cancel_scope.cancel()


async def test_a_visitor_tells_where_no_connection_has_broken_yet(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with settled(monkeypatch) as world:
        world.ip = NEW
        world.host.join("visitor")
        assert await world.learnt_s(600) < SCOUT_S


async def test_without_any_sign_it_is_known_after_a_round(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with settled(monkeypatch) as world, trio.open_nursery() as nursery:
        nursery.start_soon(visitors, world.host, 299)
        world.ip = NEW
        assert await world.learnt_s(600) < ROUND_S + 1
        nursery.cancel_scope.cancel()


async def test_a_busy_host_asks_no_more_than_twenty_peers_a_minute(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A visitor every second, none of whom is an observer: nobody is made to dial us for nothing."""
    async with settled(monkeypatch) as world, trio.open_nursery() as nursery:
        nursery.start_soon(visitors, world.host, 1.5)
        world.asks.clear()
        await trio.sleep(600)
        assert 10 * 4 <= len(world.asks) <= 10 * 20
        nursery.cancel_scope.cancel()
