"""Hole punching between hosts on loopback, which counts as the internet here. Routers are in tests/lab."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from p2pinfer.errors import PeerVanished
from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.reach import hole_punch
from p2pinfer.node.reach.circuit import reserve, serve_circuits
from p2pinfer.node.reach.hole_punch import PUNCH_PROTOCOL, HolePuncher
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.reach.relay_server import Relay
from p2pinfer.node.transport.addresses import parse_tcp
from p2pinfer.node.transport.circuit_stream import HOP_PROTOCOL, dial_circuit
from p2pinfer.node.transport.delimited import receive_message, send_message

from .support import DEAD, ECHO, StartHost, echo

Side = tuple[Host, HolePuncher]


def everybody_knows(ip: str) -> bool:
    return True


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hole_punch, "is_global", everybody_knows)
    monkeypatch.setattr(hole_punch, "BETWEEN_ROUNDS_S", 0.01)
    monkeypatch.setattr(hole_punch, "ROUND_S", 1.0)


def punching(
    host: Host,
    outside: Sequence[str] = (),
    *,
    let_in: bool = False,
    wait_s: float = 2.0,
    told: Callable[[str, bool], None] = lambda peer_id, direct: None,
) -> HolePuncher:
    """A puncher that says it is to be met at `outside`, and dials from its host's own port."""

    def source(six: bool) -> tuple[str, int] | None:
        ports = [parse_tcp(address)[2] for address in host.listening]
        return ("127.0.0.1", ports[0]) if ports and not six else None

    puncher = HolePuncher(host, lambda: outside, source, lambda: let_in, wait_s=wait_s, on_end=told)
    puncher.register()
    return puncher


async def behind(relay: Host, host: Host, puncher: HolePuncher) -> None:
    """Have `host` be reached through `relay`, as far as anybody says."""
    serve_circuits(host, puncher.arrived)
    await host.connect(relay.peer_id, relay.addrs)
    await reserve(host, relay.peer_id)


async def start_relay(start_host: StartHost) -> Host:
    relay = await start_host()
    Relay(relay, RelayConfig(), lambda stream: True).register()
    return relay


def way(relay: Host) -> list[str]:
    return [f"{relay.addrs[0]}/p2p-circuit"]


def place(host: Host) -> str:
    """Where a host is, without its id."""
    return host.direct_addrs[0].partition("/p2p/")[0]


async def test_who_can_be_reached_is_dialled_by_the_other_side(start_host: StartHost) -> None:
    relay, server, client = await start_relay(start_host), await start_host(), await start_host()
    ends: list[tuple[str, bool]] = []
    punching(client, [place(client)], let_in=True)
    await behind(relay, server, punching(server, told=lambda peer, direct: ends.append((peer, direct))))
    await client.connect(server.peer_id, way(relay))
    assert client.connection_kind(server.peer_id) == "direct"
    while not ends:
        await trio.sleep(0.01)
    assert ends == [(client.peer_id, True)]


async def test_two_that_dial_each_other_at_once_meet(start_host: StartHost) -> None:
    relay, server, client = await start_relay(start_host), await start_host(), await start_host()
    punching(client, [place(client)])
    await behind(relay, server, punching(server, [place(server)]))
    server.serve(ECHO, echo)
    await client.connect(server.peer_id, way(relay))
    assert client.connection_kind(server.peer_id) == "direct"
    async with await client.open_stream(server.peer_id, ECHO) as stream:
        assert not stream.is_relayed
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"


@pytest.mark.parametrize(
    ("rtt_s", "handshake_s", "most_s"),
    [
        (0.1, None, 2.1),
        (1.0, None, 1.1),
        (10.0, None, 2.1),
        (1.0, 1.0, 0.0),
        (1.0, 0.5, 1.1),  # as on a busy computer
        (0.1, 0.5, 2.1),
    ],
)
async def test_nobody_waits_for_an_attempt_that_takes_longer(
    rtt_s: float, handshake_s: float | None, most_s: float, autojump_clock: object
) -> None:
    """Over satellites, six round trips take ten seconds, and the relay works meanwhile."""

    class Far:
        settle: Callable[[str], Awaitable[None]]

        def serve(self, *_: object) -> None: ...

        def when_relayed(self, settle: Callable[[str], Awaitable[None]]) -> None:
            self.settle = settle

        def rtt_s(self, peer_id: str) -> float | None:
            return handshake_s

        async def ping(self, peer_id: str) -> float:
            await trio.sleep(rtt_s)
            return rtt_s

    host = Far()
    HolePuncher(cast(Host, host), list, lambda six: None, lambda: False, wait_s=2.0).register()
    began_at = trio.current_time()
    await host.settle("peer")
    assert trio.current_time() - began_at == pytest.approx(most_s, abs=0.11)


async def test_who_came_through_two_relays_is_begun_with_again_at_once_when_one_is_hung_up(
    autojump_clock: object,
) -> None:
    opened = list[float]()

    class Two:
        def connection_kind(self, peer_id: str) -> str:
            return "relayed"

        async def open_stream(self, *_: object, **__: object) -> None:
            opened.append(trio.current_time())
            await trio.sleep_forever()

    puncher = HolePuncher(cast(Host, Two()), list, lambda six: None, lambda: False, wait_s=2.0)
    began_at = trio.current_time()
    async with trio.open_nursery() as second, trio.open_nursery() as first:
        first.start_soon(puncher.arrived, "peer")
        await trio.testing.wait_all_tasks_blocked()
        second.start_soon(puncher.arrived, "peer")
        await trio.sleep(0.5)
        assert opened == [began_at]  # one at a time
        first.cancel_scope.cancel()
        second.cancel_scope.deadline = trio.current_time() + 0.2
    assert opened == [began_at, began_at + 0.5]


async def test_an_attempt_over_a_relay_that_lost_the_race_keeps_the_wait(start_host: StartHost) -> None:
    """The client has hung up on it, and waits for the attempt over the other one."""
    one, other = await start_relay(start_host), await start_relay(start_host)
    server, client = await start_host(), await start_host()
    ends: list[tuple[str, bool]] = []
    punching(client, [place(client)], wait_s=60.0, told=lambda peer, direct: ends.append((peer, direct)))
    arrived, may_begin = trio.Event(), trio.Event()
    puncher = punching(server, [place(server)])

    async def begin_late(peer_id: str) -> None:
        arrived.set()
        await may_begin.wait()
        await puncher.arrived(peer_id)

    serve_circuits(server, begin_late)
    for relay in (one, other):
        await server.connect(relay.peer_id, relay.addrs)
        await reserve(server, relay.peer_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.connect, server.peer_id, way(one))
        await arrived.wait()
        for one_side, other_side in ((server, client), (client, server)):
            while one_side.connection_kind(other_side.peer_id) is None:
                await trio.sleep(0.01)
        loser = client.libp2p.get_network().connections[ID.from_base58(server.peer_id)][0]
        stream = await client.open_stream(other.peer_id, HOP_PROTOCOL, other.addrs)
        await dial_circuit(client.libp2p.get_network(), stream, other.addrs[0], server.peer_id)
        await (await server.open_stream(client.peer_id, PUNCH_PROTOCOL)).confirm()
        await loser.close()
        while server.connection_kind(client.peer_id) is None:
            await trio.sleep(0.01)
        assert ends == []
        may_begin.set()
    assert client.connection_kind(server.peer_id) == "direct"
    while not ends:
        await trio.sleep(0.01)
    assert ends == [(server.peer_id, True)]


async def test_of_two_attempts_at_once_one_counts(
    start_host: StartHost, caplog: pytest.LogCaptureFixture
) -> None:
    """Both look for each other: with two attempts each would speak first in one and wait in the other."""
    caplog.set_level("DEBUG", logger="p2pinfer.node.reach.hole_punch")
    relay = await start_relay(start_host)
    hosts = sorted([await start_host(), await start_host()], key=lambda host: host.peer_id)
    punchers = [punching(host, [place(host)], wait_s=0.0) for host in hosts]
    for host in hosts:
        await host.connect(relay.peer_id, relay.addrs)
        await reserve(host, relay.peer_id)
        serve_circuits(host, lambda peer_id: trio.sleep_forever())
    await hosts[0].connect(hosts[1].peer_id, way(relay))
    async with trio.open_nursery() as nursery:
        for puncher, other in zip(punchers, reversed(hosts), strict=True):
            nursery.start_soon(puncher.arrived, other.peer_id)
    assert hosts[0].connection_kind(hosts[1].peer_id) == "direct"
    assert hosts[1].connection_kind(hosts[0].peer_id) == "direct"
    assert f"punch.one_is_enough peer={hosts[0].peer_id}" in caplog.text


async def test_a_stream_that_was_relayed_goes_on_beside_the_direct_connection(start_host: StartHost) -> None:
    relay, server, client = await start_relay(start_host), await start_host(), await start_host()
    punching(client, [place(client)], wait_s=0.0)
    await behind(relay, server, punching(server, [place(server)]))
    server.serve(ECHO, echo)
    stream = await client.open_stream(server.peer_id, ECHO, way(relay))
    assert stream.is_relayed
    while client.connection_kind(server.peer_id) != "direct":
        await trio.sleep(0.01)
    await stream.send_all(b"still here")
    assert await stream.receive_some() == b"still here"


async def test_where_neither_can_be_met_nobody_dials_and_nobody_waits(start_host: StartHost) -> None:
    relay, server, client = await start_relay(start_host), await start_host(), await start_host()
    ends: list[tuple[str, bool]] = []
    punching(client, wait_s=15.0)
    await behind(relay, server, punching(server, told=lambda peer, direct: ends.append((peer, direct))))
    with trio.fail_after(60):
        await client.connect(server.peer_id, way(relay))
    assert client.connection_kind(server.peer_id) == "relayed"
    while not ends:
        await trio.sleep(0.01)
    assert ends == [(client.peer_id, False)]


async def test_addresses_that_do_not_answer_end_the_attempt(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hole_punch, "ROUND_S", 0.2)
    relay, server, client = await start_relay(start_host), await start_host(), await start_host()
    ends: list[tuple[str, bool]] = []
    punching(client, [DEAD])
    await behind(
        relay, server, punching(server, [DEAD], told=lambda peer, direct: ends.append((peer, direct)))
    )
    await client.connect(server.peer_id, way(relay))
    while not ends:
        await trio.sleep(0.01)
    assert ends == [(client.peer_id, False)]
    assert client.connection_kind(server.peer_id) == "relayed"


async def test_a_peer_that_knows_nothing_of_punching_keeps_nobody(start_host: StartHost) -> None:
    relay, server, client = await start_relay(start_host), await start_host(), await start_host()
    punching(client, [place(client)], wait_s=0.2)
    serve_circuits(server, lambda peer_id: trio.sleep_forever())
    await server.connect(relay.peer_id, relay.addrs)
    await reserve(server, relay.peer_id)
    await client.connect(server.peer_id, way(relay))
    assert client.connection_kind(server.peer_id) == "relayed"


async def test_over_a_direct_connection_there_is_nothing_to_punch(start_host: StartHost) -> None:
    server, client = await start_host(), await start_host()
    punching(server, [place(server)])
    with pytest.raises(PeerVanished):
        async with await client.open_stream(server.peer_id, PUNCH_PROTOCOL, server.addrs) as stream:
            await send_message(stream, HolePunch(type=HolePunch.CONNECT))
            await receive_message(stream, HolePunch)


@pytest.mark.parametrize("second", [HolePunch.CONNECT, None])
async def test_who_says_something_else_than_sync_is_cut_off(
    start_host: StartHost, second: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hole_punch, "ANSWER_S", 0.3 if second is None else 3600.0)
    relay, server, client = (
        await start_relay(start_host),
        await start_host(),
        await start_host(HostConfig(listen=())),
    )
    punching(client, [place(server)], wait_s=0.0, let_in=True)

    async def rude(peer_id: str) -> None:
        async with await server.open_stream(peer_id, PUNCH_PROTOCOL) as stream:
            with pytest.raises(PeerVanished):
                await send_message(stream, HolePunch(type=HolePunch.CONNECT))
                await receive_message(stream, HolePunch)
                if second is not None:
                    await send_message(stream, HolePunch(type=second))  # type: ignore[arg-type]
                await stream.receive_some()
        cut_off.set()
        await trio.sleep_forever()

    cut_off = trio.Event()
    serve_circuits(server, rude)
    await server.connect(relay.peer_id, relay.addrs)
    await reserve(server, relay.peer_id)
    await client.connect(server.peer_id, way(relay))
    await cut_off.wait()


async def test_a_victim_that_peers_name_is_dialled_a_few_times_and_then_left_alone(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes through a relay may say that it is to be met anywhere."""
    victim = [f"/ip4/11.0.0.1/tcp/{port}" for port in range(1, 9)]
    relay, server = await start_relay(start_host), await start_host()
    dialled: list[str] = []
    ends: list[tuple[str, bool]] = []

    async def refuse(peer_id: str, address: str, *_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        dialled.append(address)
        raise OSError("refused")

    monkeypatch.setattr(server, "dial_from", refuse)
    await behind(
        relay, server, punching(server, [DEAD], told=lambda peer, direct: ends.append((peer, direct)))
    )
    for count in range(3):
        attacker = await start_host(HostConfig(listen=()))
        punching(attacker, victim, wait_s=0.0)
        await attacker.connect(server.peer_id, way(relay))
        while len(ends) <= count:
            await trio.sleep(0.01)
    rounds = hole_punch.ROUNDS_AT_ONCE
    assert set(dialled) == {victim[0]}
    assert rounds <= len(dialled) < 15 * rounds * hole_punch.ROUND_S
