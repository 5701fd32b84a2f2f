"""Real hosts on loopback: handlers, dialling, who is connected, how it ends."""

from __future__ import annotations

import socket

import pytest
import trio
from libp2p.peer.id import ID

from p2pinfer.errors import PeerRefused, PeerUnreachable
from p2pinfer.node.host.host import HostConfig
from p2pinfer.node.transport.identity import new_identity

from .support import DEAD, ECHO, StartHost, echo


async def test_two_hosts_talk(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)
    async with await alice.open_stream(bob.peer_id, ECHO, bob.addrs) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        assert stream.peer_id == bob.peer_id
        assert alice.connected_peers() == [bob.peer_id]
        assert alice.connection_kind(bob.peer_id) == "direct"
        assert bob.connection_kind(alice.peer_id) == "direct"


async def test_a_host_that_only_dials_has_no_addresses_and_is_served_all_the_same(
    start_host: StartHost,
) -> None:
    client, server = await start_host(HostConfig(listen=())), await start_host()
    client.serve(ECHO, echo)
    assert client.addrs == ()
    await client.connect(server.peer_id, server.addrs)
    async with await server.open_stream(client.peer_id, ECHO) as stream:
        await stream.send_all(b"back")
        assert await stream.receive_some() == b"back"


async def test_addresses_name_the_peer_and_are_never_a_wildcard(start_host: StartHost) -> None:
    host = await start_host(HostConfig(listen=("/ip4/0.0.0.0/tcp/0",)))
    assert host.addrs
    assert all(address.endswith(f"/p2p/{host.peer_id}") for address in host.addrs)
    assert not any("0.0.0.0" in address for address in host.addrs)


async def test_addresses_follow_the_machine_but_are_not_looked_up_each_time(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await start_host()
    first = host.addrs

    def moved(_: object) -> list[str]:
        return ["/ip4/192.0.2.7/tcp/4001"]

    monkeypatch.setattr("p2pinfer.node.host.libp2p_host.advertised", moved)
    assert host.addrs == first
    monkeypatch.setattr("p2pinfer.node.host.libp2p_host.ADDRESSES_LAST_S", -1.0)
    assert host.addrs == (f"/ip4/192.0.2.7/tcp/4001/p2p/{host.peer_id}",)


async def test_a_live_connection_is_used_again(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)
    async with (
        await alice.open_stream(bob.peer_id, ECHO, bob.addrs),
        await alice.open_stream(bob.peer_id, ECHO),
    ):
        assert len(alice.libp2p.get_network().connections[ID.from_base58(bob.peer_id)]) == 1


async def test_callers_at_the_same_time_share_one_dial(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)

    async def call() -> None:
        async with await alice.open_stream(bob.peer_id, ECHO, bob.addrs):
            pass

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(call)
    assert len(alice.libp2p.get_network().connections[ID.from_base58(bob.peer_id)]) == 1


async def test_a_dial_that_fails_fails_for_all_who_wait_and_can_be_repeated_at_once(
    start_host: StartHost,
) -> None:
    """libp2p itself would refuse the peer for a minute after the failure."""
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)
    failures: list[PeerUnreachable] = []

    async def call() -> None:
        with pytest.raises(PeerUnreachable) as caught:
            await alice.open_stream(bob.peer_id, ECHO, [DEAD])
        failures.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        nursery.start_soon(call)
    assert [failure.peer_id for failure in failures] == [bob.peer_id] * 2
    async with await alice.open_stream(bob.peer_id, ECHO, bob.addrs):
        pass


async def test_who_waits_for_a_dial_tries_the_addresses_that_only_it_knows(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()

    async def call_with(addrs: list[str]) -> None:
        try:
            await alice.connect(bob.peer_id, addrs)
        except PeerUnreachable:
            assert addrs == [DEAD]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call_with, [DEAD])
        nursery.start_soon(call_with, [DEAD, *bob.addrs])
    assert alice.connected_peers() == [bob.peer_id]


async def test_a_dead_address_does_not_hide_a_good_one(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    await alice.connect(bob.peer_id, [DEAD, *bob.addrs])
    assert alice.connected_peers() == [bob.peer_id]


async def test_an_address_that_accepts_and_says_nothing_does_not_hide_a_good_one(
    start_host: StartHost,
) -> None:
    alice, bob = await start_host(), await start_host()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        await alice.connect(bob.peer_id, [f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}", *bob.addrs])
        assert alice.connected_peers() == [bob.peer_id]


async def test_nobody_answering_says_who_what_and_why(start_host: StartHost) -> None:
    alice = await start_host(HostConfig(listen=(), dial_timeout_s=0.5, dial_stagger_s=0.01))
    nobody = new_identity().peer_id
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_address = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        with pytest.raises(PeerUnreachable) as caught:
            await alice.connect(
                nobody, [DEAD, silent_address, "/ip4/nonsense", f"{DEAD}/p2p/{alice.peer_id}"]
            )
    message = str(caught.value)
    assert nobody in message
    assert f"{DEAD}: " in message
    assert "refused" in message
    assert f"{silent_address}: no answer within 0.5 s" in message
    assert "/ip4/nonsense: " in message
    assert f"that is peer {alice.peer_id}" in message


async def test_a_peer_without_known_addresses_is_unreachable(start_host: StartHost) -> None:
    alice = await start_host()
    with pytest.raises(PeerUnreachable, match="no address"):
        await alice.connect(new_identity().peer_id)
    with pytest.raises(PeerUnreachable, match="not a peer id"):
        await alice.connect("nobody", [DEAD])
    with pytest.raises(PeerUnreachable, match="does not dial itself"):
        await alice.connect(alice.peer_id, alice.addrs)
    assert alice.connection_kind("nobody") is None


async def test_another_peer_at_the_address_is_not_taken_for_the_one_we_want(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    address = bob.addrs[0].partition("/p2p/")[0]
    with pytest.raises(PeerUnreachable, match="peer id"):
        await alice.connect(new_identity().peer_id, [address])
    assert alice.connected_peers() == []


async def test_a_protocol_that_nobody_serves_is_refused(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    with pytest.raises(PeerRefused, match="does not speak /unknown") as caught:
        await alice.open_stream(bob.peer_id, "/unknown", bob.addrs)
    assert caught.value.peer_id == bob.peer_id
    bob.serve(ECHO, echo)
    bob.stop_serving(ECHO)
    with pytest.raises(PeerRefused):
        await alice.open_stream(bob.peer_id, ECHO)


@pytest.mark.parametrize("optimistic", [False, True])
async def test_a_peer_that_does_not_negotiate_in_time_is_unreachable(
    start_host: StartHost, optimistic: bool
) -> None:
    alice = await start_host(HostConfig(listen=(), stream_timeout_s=0.1))
    bob = await start_host()

    async def say_nothing(stream: object) -> None:
        await trio.sleep_forever()

    bob.libp2p.get_network().set_stream_handler(say_nothing)
    with pytest.raises(PeerUnreachable, match=r"no stream within 0\.\d s"):
        stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs, optimistic=optimistic)
        await stream.receive_some()
