"""Connections through a relay, with real hosts: two that cannot dial each other, and one between them."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from p2pinfer.errors import PeerError, PeerRefused, PeerUnreachable, PeerVanished
from p2pinfer.node.host.host import Host, HostConfig
from p2pinfer.node.reach.circuit import STOP_PROTOCOL, reserve, serve_circuits
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.reach.relay_server import Relay
from p2pinfer.node.transport.circuit_stream import HOP_PROTOCOL
from p2pinfer.node.transport.identity import new_identity

from .support import DEAD, ECHO, LOOPBACK, StartHost, accept, echo, receive_exactly

NONSENSE = [b"", b"\xff\xff\xff\xff", b"\x05hello", b"\x02\x08\x02", b"\x80\x80\x01", b"\x02\x08\x01"]


async def ignore(peer_id: str) -> None:
    await trio.sleep_forever()


UNLIMITED = {"bytes_per_s": 1e9, "bytes_per_s_per_peer": 1e9}


def start_relay(host: Host, **limits: float) -> Relay:
    relay = Relay(host, RelayConfig(**limits), lambda stream: True)  # type: ignore[arg-type]
    relay.register()
    return relay


async def behind(relay: Host, start_host: StartHost) -> Host:
    """A host that can be reached through `relay` and in no other way."""
    host = await start_host(HostConfig(listen=()))
    serve_circuits(host, ignore)
    await host.connect(relay.peer_id, relay.addrs)
    await reserve(host, relay.peer_id)
    host.be_reached_through([relay.addrs[0]])
    return host


async def test_a_peer_that_cannot_be_dialled_is_reached_through_its_relay(start_host: StartHost) -> None:
    relay, client = await start_host(), await start_host(HostConfig(listen=()))
    carrying = start_relay(relay, **UNLIMITED)
    server = await behind(relay, start_host)
    server.serve(ECHO, echo)
    assert server.addrs == (f"{relay.addrs[0]}/p2p-circuit/p2p/{server.peer_id}",)
    payload = bytes(range(256)) * 4000
    async with await client.open_stream(server.peer_id, ECHO, server.addrs) as stream:
        assert stream.is_relayed
        assert stream.remote_address is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, payload)
            assert await receive_exactly(stream, len(payload)) == payload
        assert client.connection_kind(server.peer_id) == "relayed"
        assert server.connection_kind(client.peer_id) == "relayed"
        assert carrying.use.circuits == 1
        assert carrying.use.bytes_carried > 2 * len(payload)


async def dialled(start_host: StartHost, server: Host) -> Host:
    """A client that has connected to `server`."""
    client = await start_host(HostConfig(listen=()))
    await client.connect(server.peer_id, server.addrs)
    return client


async def test_two_circuits_to_one_peer_end_apart(start_host: StartHost) -> None:
    relay = await start_host()
    carrying = start_relay(relay)
    server = await behind(relay, start_host)
    server.serve(ECHO, echo)
    first, second = await dialled(start_host, server), await dialled(start_host, server)
    stream = await second.open_stream(server.peer_id, ECHO)
    await first.open_stream(server.peer_id, ECHO)
    assert carrying.use.circuits == 2
    await first.libp2p.get_network().close()
    while carrying.use.circuits == 2:
        await trio.sleep(0.01)
    await stream.send_all(b"still here")
    assert await stream.receive_some() == b"still here"


async def test_a_peer_whose_own_address_answers_is_not_reached_through_a_relay(start_host: StartHost) -> None:
    relay, client = await start_host(), await start_host()
    carrying = start_relay(relay)
    neighbour = await start_host()
    await client.connect(neighbour.peer_id, [*neighbour.addrs, f"{relay.addrs[0]}/p2p-circuit"])
    assert client.connection_kind(neighbour.peer_id) == "direct"
    assert carrying.use.circuits == 0


async def test_a_dead_address_costs_no_head_start(start_host: StartHost) -> None:
    config = HostConfig(listen=(), relay_head_start_s=60.0)
    relay, client = await start_host(), await start_host(config)
    start_relay(relay)
    server = await behind(relay, start_host)
    await client.connect(server.peer_id, [DEAD, *server.addrs])
    assert client.connection_kind(server.peer_id) == "relayed"


@pytest.mark.parametrize("listed", ["deny", "allow"])
async def test_a_relay_carries_for_those_on_its_list(start_host: StartHost, listed: str) -> None:
    """Who is not may connect all the same, and have its blocks or its prompt served."""
    friend, stranger = new_identity(), new_identity()
    entry = f"relaying:{(friend if listed == 'allow' else stranger).peer_id}"
    relay = await start_host(HostConfig(listen=LOOPBACK.listen, **{listed: (entry,)}))  # type: ignore[arg-type]
    start_relay(relay)
    carried, other = [await start_host(HostConfig(listen=()), each) for each in (friend, stranger)]
    for host in (carried, other):
        serve_circuits(host, ignore)
        await host.connect(relay.peer_id, relay.addrs)
    await reserve(carried, relay.peer_id)
    with pytest.raises(PeerError):
        await reserve(other, relay.peer_id)
    with pytest.raises(PeerUnreachable):
        await other.connect(carried.peer_id, [f"{relay.addrs[0]}/p2p-circuit"])
    assert other.connection_kind(relay.peer_id) == "direct"


async def test_nobody_is_connected_with_a_peer_that_did_not_ask_for_it(start_host: StartHost) -> None:
    relay, client, other = await start_host(), await start_host(), await start_host(HostConfig(listen=()))
    start_relay(relay)
    serve_circuits(other, ignore)
    await other.connect(relay.peer_id, relay.addrs)
    with pytest.raises(PeerUnreachable, match="no reservation"):
        await client.connect(other.peer_id, [f"{relay.addrs[0]}/p2p-circuit"])


async def test_a_reservation_ends_with_its_connection_and_its_time(start_host: StartHost) -> None:
    relay = await start_host()
    carrying = start_relay(relay)
    server = await behind(relay, start_host)
    assert carrying.use.reservations == 1
    await server.libp2p.get_network().close()
    while carrying.use.reservations:
        await trio.sleep(0.01)
    brief = await start_host()
    passing = start_relay(brief, reservation_s=0.05)
    await behind(brief, start_host)
    while passing.use.reservations:
        await trio.sleep(0.01)


@pytest.mark.parametrize("limit", ["max_reservations", "max_reservations_per_ip"])
async def test_a_relay_has_so_many_places_and_renews_those_that_are_taken(
    start_host: StartHost, limit: str
) -> None:
    relay = await start_host()
    start_relay(relay, **{limit: 1})
    server = await behind(relay, start_host)
    with pytest.raises(PeerRefused, match="resource limit exceeded"):
        await behind(relay, start_host)
    assert (await reserve(server, relay.peer_id)).expires_s > 3000


async def test_a_relay_that_cannot_be_reached_gives_no_places(start_host: StartHost) -> None:
    relay = await start_host()
    Relay(relay, RelayConfig(), lambda stream: False).register()
    with pytest.raises(PeerRefused, match="reservation refused"):
        await behind(relay, start_host)


@pytest.mark.parametrize("limits", [{"max_circuits": 1}, {"max_circuits_per_peer": 1}])
async def test_a_relay_carries_so_many_circuits(start_host: StartHost, limits: dict[str, float]) -> None:
    relay = await start_host()
    carrying = start_relay(relay, **limits)
    server = await behind(relay, start_host)
    first = await dialled(start_host, server)
    with pytest.raises(PeerUnreachable, match="resource limit exceeded"):
        await dialled(start_host, server)
    await first.libp2p.get_network().close()
    while carrying.use.circuits:
        await trio.sleep(0.01)
    await dialled(start_host, server)


@pytest.mark.parametrize("limits", [{"max_circuit_bytes": 100_000}, {"max_circuit_s": 0.5}])
async def test_a_circuit_ends_when_its_bytes_or_its_time_are_spent(
    start_host: StartHost, limits: dict[str, float]
) -> None:
    relay = await start_host()
    carrying = start_relay(relay, **limits)
    server = await behind(relay, start_host)
    server.serve(ECHO, echo)
    client = await dialled(start_host, server)
    stream = await client.open_stream(server.peer_id, ECHO)
    with pytest.raises(PeerVanished):
        while True:
            await stream.send_all(bytes(10_000))
            assert await stream.receive_some()
    while carrying.use.circuits:
        await trio.sleep(0.01)
    assert carrying.use.bytes_carried <= 100_000 or "max_circuit_s" in limits
    assert server.connected_peers() == [relay.peer_id]


async def test_a_circuit_keeps_to_its_rate(start_host: StartHost) -> None:
    relay = await start_host()
    start_relay(relay, bytes_per_s_per_peer=400_000)
    server = await behind(relay, start_host)
    streams = accept(server, ECHO)
    client = await dialled(start_host, server)
    stream = await client.open_stream(server.peer_id, ECHO)
    arriving = await streams.receive()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, bytes(600_000))
        await receive_exactly(arriving, 600_000)
    assert trio.current_time() - began > 0.4  # a second's worth goes at once


async def test_a_relay_does_not_chain_relays(start_host: StartHost) -> None:
    relay = await start_host()
    start_relay(relay)
    server = await behind(relay, start_host)
    start_relay(server)
    client = await dialled(start_host, server)
    with pytest.raises(PeerRefused, match="permission denied"):
        await reserve(client, server.peer_id)


async def test_who_cancels_a_write_on_a_circuit_harms_nobody_else(start_host: StartHost) -> None:
    relay = await start_host()
    start_relay(relay, **UNLIMITED)
    server = await behind(relay, start_host)
    server.serve(ECHO, echo)
    client = await dialled(start_host, server)
    steady = await client.open_stream(server.peer_id, ECHO)
    for _ in range(20):
        hasty = await client.open_stream(server.peer_id, ECHO)
        with trio.move_on_after(0.005):
            await hasty.send_all(bytes(4 << 20))
        await hasty.reset()
        await steady.send_all(b"ping")
        assert await steady.receive_some() == b"ping"


@pytest.mark.parametrize("request_bytes", NONSENSE)
async def test_nonsense_from_a_peer_ends_its_stream_only(start_host: StartHost, request_bytes: bytes) -> None:
    relay, client = await start_host(), await start_host()
    start_relay(relay)
    serve_circuits(relay, ignore)
    relay.serve(ECHO, echo)
    for protocol in (HOP_PROTOCOL, STOP_PROTOCOL):
        async with await client.open_stream(relay.peer_id, protocol, relay.addrs) as stream:
            await stream.send_all(request_bytes)
            stream.muxed.end()
            with suppress(PeerVanished):
                while await stream.receive_some():
                    pass
    async with await client.open_stream(relay.peer_id, ECHO) as stream:
        await stream.send_all(b"fine")
        assert await stream.receive_some() == b"fine"
