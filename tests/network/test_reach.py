"""How a host finds out what it is and what it does about it; loopback counts as the internet here."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import trio

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.reach import observers, reach, reachability, relay_candidates, relay_departure
from p2pinfer.node.reach import own_addresses as own
from p2pinfer.node.reach.circuit import reserve, serve_circuits
from p2pinfer.node.reach.dialback import serve_dialback
from p2pinfer.node.reach.reach import Reach, open_reach
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.reach.relay_server import Relay
from p2pinfer.node.reach.upnp import Mapping, NoMapping
from p2pinfer.node.transport.addresses import parse_tcp
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import Announcement

from .support import LOOPBACK, StartHost

HERE, ELSEWHERE = ["127.0.0.1"], ["192.0.2.1"]
NO_UPNP = HostConfig(listen=LOOPBACK.listen, upnp=False)
CLIENT = HostConfig(listen=(), upnp=False)


def nobody() -> Sequence[Announcement]:
    return ()


def known_everywhere(ip: str) -> bool:
    return True


@pytest.fixture(autouse=True)
def internet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is the internet, and hosts are behind a router unless a test says otherwise."""
    for module in (relay_candidates, reachability, observers):
        monkeypatch.setattr(module, "is_global", known_everywhere)
    monkeypatch.setattr(reach, "SETTLE_S", 0.01)
    monkeypatch.setattr(reach, "TOGETHER_S", 0.01)
    own_addresses(monkeypatch, ELSEWHERE)


def own_addresses(monkeypatch: pytest.MonkeyPatch, ips: list[str]) -> None:
    def addresses(protocol: str) -> list[str]:
        return ips

    monkeypatch.setattr(own, "machine_addresses", addresses)


@asynccontextmanager
async def reached(
    config: HostConfig = NO_UPNP,
    announcements: Callable[[], Sequence[Announcement]] = nobody,
    relay_config: RelayConfig | None = None,
) -> AsyncGenerator[tuple[Host, Reach]]:
    async with (
        open_host(new_identity(), config) as host,
        open_reach(host, config, relay_config or RelayConfig(), announcements) as found,
    ):
        yield host, found


def deaf(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """Let dial-backs find another port than the host's: a router lets nothing in."""
    listening = cast(Any, Host.listening).fget

    def told(self: Host) -> tuple[str, ...]:
        return ("/ip4/127.0.0.1/tcp/1",) if self is host else cast("tuple[str, ...]", listening(self))

    monkeypatch.setattr(Host, "listening", property(told))


async def until(what: Callable[[], bool]) -> None:
    while not what():
        await trio.sleep(0.01)


async def test_a_host_whose_own_address_answers_is_public_and_relays(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_addresses(monkeypatch, HERE)
    observer = await start_host()
    serve_dialback(observer)
    async with reached() as (host, found):
        told: list[str] = []
        with found.telling(lambda: told.append(found.reachability.kind)):
            await host.connect(observer.peer_id, observer.addrs)
            await found.known.wait()
            assert (found.reachability.kind, found.reachability.nat) == ("public", "none")
            assert host.addrs[0] == host.direct_addrs[0] == f"{host.listening[0]}/p2p/{host.peer_id}"
            await until(lambda: bool(told))
        assert (await observer_reserves(observer, host)) > 0
        assert found.status.carried is not None
        assert found.status.carried.reservations == 1


async def observer_reserves(observer: Host, relay: Host) -> float:
    return (await reserve(observer, relay.peer_id)).expires_s


async def test_a_host_that_a_forwarded_port_leads_to_is_mapped(start_host: StartHost) -> None:
    observer = await start_host()
    serve_dialback(observer)
    async with reached() as (host, found):
        await host.connect(observer.peer_id, observer.addrs)
        await found.known.wait()
        assert found.reachability.kind == "mapped"


async def test_a_host_behind_a_router_is_carried_by_two_relays_and_replaces_one_that_dies(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(observers, "MAX_OBSERVERS", 3)
    ends: list[trio.CancelScope] = []
    relays: list[tuple[str, Sequence[str]]] = []

    async def run_relay(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.CancelScope() as scope:
            async with reached() as (relay, _):
                ends.append(scope)
                relays.append((relay.peer_id, relay.addrs))
                task_status.started()
                await trio.sleep_forever()

    for _ in range(3):
        await nursery.start(run_relay)
    async with reached() as (host, found):
        deaf(monkeypatch, host)
        for peer_id, addrs in relays:
            await host.connect(peer_id, addrs)
        await until(lambda: len(found.status.relays) == 2)
        assert found.reachability.kind == "private"
        assert sum("/p2p-circuit/" in address for address in host.addrs) == 2
        ends[[peer_id for peer_id, _ in relays].index(found.status.relays[0])].cancel()
        before = found.status.relays
        await until(lambda: len(found.status.relays) == 2 and found.status.relays != before)
    nursery.cancel_scope.cancel()


async def test_a_port_of_the_routers_is_asked_for_and_announced(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = await start_host()
    serve_dialback(observer)
    config = HostConfig(listen=LOOPBACK.listen)
    async with reached(config) as (host, found):
        real = parse_tcp(host.listening[0])[2]
        deaf(monkeypatch, host)
        removed = trio.Event()

        @asynccontextmanager
        async def mapping(inside: int, *_: object) -> AsyncGenerator[Mapping]:
            try:
                yield Mapping("127.0.0.1", real, inside, 60)
            finally:
                removed.set()

        monkeypatch.setattr(reach, "open_mapping", mapping)
        await host.connect(observer.peer_id, observer.addrs)
        await found.known.wait()
        assert found.reachability.kind == "mapped"
        assert found.reachability.addrs == (f"/ip4/127.0.0.1/tcp/{real}",)
        assert str(real) in found.status.upnp
    assert removed.is_set()


@pytest.mark.parametrize("refused", [True, False])
async def test_a_router_that_does_not_help_is_said_not_to(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    observer = await start_host()
    serve_dialback(observer)

    @asynccontextmanager
    async def mapping(inside: int, *_: object) -> AsyncGenerator[Mapping]:
        if refused:
            raise NoMapping("no router answers to UPnP")
        yield Mapping("100.64.0.2", 2, inside, 60)

    monkeypatch.setattr(reach, "open_mapping", mapping)
    async with reached(HostConfig(listen=LOOPBACK.listen)) as (host, found):
        deaf(monkeypatch, host)
        await host.connect(observer.peer_id, observer.addrs)
        await found.known.wait()
        assert found.reachability.kind == "private"
        assert ("no router answers" if refused else "another router") in found.status.upnp


async def test_two_that_are_reached_through_a_relay_meet(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not listen opens its port for a server that no hole can be punched to."""
    async with reached() as (relay, _), reached() as (server, serving), reached(CLIENT) as (client, asking):
        for each in (server, client):
            await each.connect(relay.peer_id, relay.addrs)
        await reserve(server, relay.peer_id)
        await until(lambda: asking.reachability.kind != "unknown")
        asking.reachability = reachability.Reachability("private", "firewall", ("127.0.0.1",))
        serving.reachability = reachability.Reachability("private", "symmetric", ("127.0.0.1",))
        monkeypatch.setattr("p2pinfer.node.reach.hole_punch.is_global", known_everywhere)
        await client.connect(server.peer_id, [f"{relay.addrs[0]}/p2p-circuit"])
        assert client.connection_kind(server.peer_id) == "direct"
        await until(lambda: serving.status.punched == (client.peer_id,))


async def test_where_punching_is_off_a_relayed_connection_stays_one(start_host: StartHost) -> None:
    quiet = HostConfig(listen=LOOPBACK.listen, upnp=False, punch=False)
    async with reached() as (relay, _), reached(quiet) as (server, _), reached(quiet) as (client, _):
        await server.connect(relay.peer_id, relay.addrs)
        await reserve(server, relay.peer_id)
        await client.connect(server.peer_id, [f"{relay.addrs[0]}/p2p-circuit"])
        assert client.connection_kind(server.peer_id) == "relayed"


async def test_announced_peers_that_can_be_reached_are_relays_too(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = await start_host()  # does not relay
    serve_dialback(observer)
    async with reached() as (relay, _):
        offers = [
            Announcement(
                peer_id,
                "model",
                "a" * 32,
                BlockSpan(0, 4),
                "float32",
                1.0,
                1,
                1,
                reachability="public",
                addrs=addrs,
            )
            for peer_id, addrs in [
                (relay.peer_id, ("nonsense", f"{relay.addrs[0]}/p2p-circuit", relay.addrs[0])),
                (new_identity().peer_id, ("/dns4/example.org/tcp/1",)),
            ]
        ]
        async with reached(announcements=lambda: offers) as (host, found):
            deaf(monkeypatch, host)
            await host.connect(observer.peer_id, observer.addrs)
            await until(lambda: found.status.relays == (relay.peer_id,))


async def test_a_private_host_carries_nothing_and_a_lost_peer_is_asked_again(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    observer = await start_host()
    serve_dialback(observer)
    with caplog.at_level(logging.INFO, "p2pinfer"):
        async with reached(HostConfig(listen=LOOPBACK.listen, upnp=False, relays=0)) as (host, found):
            deaf(monkeypatch, host)
            await host.connect(observer.peer_id, observer.addrs)
            await found.known.wait()
            with pytest.raises(Exception, match="refused"):
                await observer_reserves(observer, host)
            await observer.libp2p.get_network().close_peer(
                next(iter(observer.libp2p.get_network().connections))
            )
            await until(lambda: not host.connected_peers())
            await host.connect(observer.peer_id, observer.addrs)
            await until(lambda: "behind a router" in caplog.text)


def test_a_memory_of_punches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "MAX_PUNCHED", 2)

    async def main() -> None:
        async with reached() as (_, found):
            for name in ("a", "b", "c"):
                found._note_punch(name, name != "b")  # pyright: ignore[reportPrivateUsage]
            assert (found.status.punched, found.status.relayed) == (("c",), ("b",))

    trio.run(main)


async def test_a_relayed_peer_that_turns_out_to_be_reachable_is_dialled(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_departure, "LEAVE_RELAY_S", 0.05)
    relay, server = await start_host(), await start_host()
    Relay(relay, RelayConfig(), lambda stream: True).register()
    serve_circuits(server, lambda peer_id: trio.sleep_forever())
    await server.connect(relay.peer_id, relay.addrs)
    await reserve(server, relay.peer_id)
    said = Announcement(server.peer_id, "m", "a" * 32, BlockSpan(0, 1), "float32", 1.0, 1, 1, "private")
    announced = [said]
    async with reached(CLIENT, lambda: announced) as (host, _):
        await host.connect(server.peer_id, [f"{relay.addrs[0]}/p2p-circuit"])
        assert host.connection_kind(server.peer_id) == "relayed"
        dead = "/ip4/127.0.0.1/tcp/1"
        announced[0] = replace(said, sequence=2, reachability="mapped", addrs=(dead, *server.direct_addrs))
        await until(lambda: host.connection_kind(server.peer_id) == "direct")
