"""Real hosts on loopback: handlers, dialling, who is connected, how it ends."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import suppress
from typing import Any

import pytest
import trio
from libp2p import new_host
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr

from p2pinfer.errors import AddressUnusable, PeerError, PeerRefused, PeerUnreachable, PeerVanished
from p2pinfer.node.host.host import HostConfig, open_host
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream

from .support import DEAD, ECHO, LOOPBACK, StartHost, accept, echo, receive_exactly


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
    with pytest.raises(PeerUnreachable, match=r"no stream within 0\.1 s"):
        stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs, optimistic=optimistic)
        await stream.receive_some()


@pytest.mark.parametrize("optimistic", [False, True])
async def test_too_many_streams_are_refused_and_room_is_made_when_one_ends(
    start_host: StartHost, optimistic: bool
) -> None:
    alice = await start_host()
    bob = await start_host(HostConfig(listen=LOOPBACK.listen, max_streams_per_peer=3))
    accepted = accept(bob, ECHO)
    await alice.connect(bob.peer_id, bob.addrs)
    streams: list[PeerStream] = []
    with pytest.raises(PeerRefused, match="as many streams open as it allows") as caught:
        while len(streams) < 4:
            stream = await alice.open_stream(bob.peer_id, ECHO, optimistic=optimistic)
            await stream.confirm()
            streams.append(stream)
            await accepted.receive()
    assert streams
    assert caught.value.is_passing
    assert bob.counts.by_label("refusals") == {"streams": 1}
    await streams.pop().reset()
    await alice.ping(bob.peer_id)  # by its answer bob has seen the reset
    await alice.open_stream(bob.peer_id, ECHO)


async def test_what_is_said_at_once_goes_out_before_the_peer_has_agreed(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()

    async def hear_all_first(stream: Any) -> None:
        heard = b""
        while not heard.endswith(b"hello"):
            heard += await stream.muxed_stream.read(100)
        await stream.muxed_stream.write(heard.removesuffix(b"hello") + b"well")

    bob.libp2p.get_network().set_stream_handler(hear_all_first)
    stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs, optimistic=True)
    await stream.send_all(b"hello")
    assert await receive_exactly(stream, 4) == b"well"


async def test_an_ordinary_peer_takes_what_is_said_at_once(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)
    async with await alice.open_stream(bob.peer_id, ECHO, bob.addrs, optimistic=True) as stream:
        await stream.send_all(b"hello")
        assert await receive_exactly(stream, 5) == b"hello"
        await stream.confirm()  # it has


async def test_a_refusal_of_what_was_said_at_once_has_its_reason(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    stream = await alice.open_stream(bob.peer_id, "/unknown", bob.addrs, optimistic=True)
    await stream.send_all(b"\x00\x00\x00\x05hello")
    with pytest.raises(PeerRefused, match="does not speak /unknown") as caught:
        await stream.receive_some()
    assert (caught.value.peer_id, caught.value.code) == (bob.peer_id, "not_spoken")
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()


async def test_a_connection_that_is_lost_before_the_peer_agrees_says_so(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()

    async def hang_up(stream: Any) -> None:
        with suppress(MuxedStreamError):  # gossip has streams too, and they end with the connection
            await stream.muxed_stream.read(1)
            await stream.muxed_conn.close()

    bob.libp2p.get_network().set_stream_handler(hang_up)
    frames: FrameStream | None = None
    # Where gossip's stream was the first, the connection may be gone while the stream is asked for.
    with pytest.raises(PeerUnreachable, match="was lost while opening a stream"):
        stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs, optimistic=True)
        frames = FrameStream(stream, max_payload_bytes=0, peer_id=bob.peer_id)
        await frames.receive()
    if frames is not None:
        await frames.end()  # nobody is there to hear it


# ---------------------------------------------------------------------- handlers


async def test_a_peers_fault_ends_its_stream_only(
    start_host: StartHost, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)

    async def fail(stream: PeerStream) -> None:
        async with trio.open_nursery():
            raise PeerError("bad peer")

    bob.serve("/fail", fail)
    with caplog.at_level(logging.DEBUG, "p2pinfer"):
        stream = await alice.open_stream(bob.peer_id, "/fail", bob.addrs)
        with pytest.raises(PeerVanished):
            await stream.receive_some()
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
    assert "bad peer" in caplog.text
    async with await alice.open_stream(bob.peer_id, ECHO) as another:
        await another.send_all(b"still here")
        assert await another.receive_some() == b"still here"


async def test_a_bug_in_a_handler_is_logged_and_ends_its_stream_only(
    start_host: StartHost, caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)

    async def fail(stream: PeerStream) -> None:
        raise KeyError("a bug")

    bob.serve("/fail", fail)
    stream = await alice.open_stream(bob.peer_id, "/fail", bob.addrs)
    with pytest.raises(PeerVanished):
        await stream.receive_some()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info
    async with await alice.open_stream(bob.peer_id, ECHO) as another:
        await another.send_all(b"still here")
        assert await another.receive_some() == b"still here"


async def test_a_stream_ends_when_its_handler_returns(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()

    async def greet(stream: PeerStream) -> None:
        await stream.send_all(b"hello")

    bob.serve("/greet", greet)
    stream = await alice.open_stream(bob.peer_id, "/greet", bob.addrs)
    assert await stream.receive_some() == b"hello"
    assert await stream.receive_some() == b""


@pytest.mark.parametrize(
    "garbage", [b"\x03\xff\xff\n", b"\xff" * 12, b"\x00", b"\x13/multistream/1.0.0\n\x03\xff\xff\n"]
)
async def test_a_stream_that_begins_with_garbage_ends_and_nothing_else_does(
    start_host: StartHost, garbage: bytes
) -> None:
    """UnicodeDecodeError out of the negotiation would otherwise end the whole host."""
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)
    await alice.connect(bob.peer_id, bob.addrs)
    [connection] = alice.libp2p.get_network().connections[ID.from_base58(bob.peer_id)]
    stream = await connection.new_stream()
    await stream.write(garbage)
    with pytest.raises(BaseLibp2pError):
        while True:
            await stream.read(100)
    async with await alice.open_stream(bob.peer_id, ECHO) as another:
        await another.send_all(b"still here")
        assert await another.receive_some() == b"still here"


# ---------------------------------------------------------------------- coming and going


async def test_connections_are_reported_once_a_peer(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    came, went = trio.Event(), trio.Event()
    events: list[str] = []

    def on_connected(peer_id: str) -> None:
        events.append(f"+{peer_id}")
        came.set()

    def on_disconnected(peer_id: str) -> None:
        events.append(f"-{peer_id}")
        went.set()

    bob.when_connected(on_connected)
    bob.when_disconnected(on_disconnected)
    identity = new_identity()
    async with open_host(identity, LOOPBACK) as visitor:
        await visitor.connect(bob.peer_id, bob.addrs)
        await came.wait()
    await went.wait()
    assert events == [f"+{identity.peer_id}", f"-{identity.peer_id}"]
    assert bob.connected_peers() == []
    assert alice.connected_peers() == []


async def test_the_end_of_a_host_is_noticed_by_its_streams(start_host: StartHost) -> None:
    alice = await start_host()
    async with open_host(new_identity(), LOOPBACK) as bob:
        accept(bob, ECHO)
        stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs)
        bob_id = bob.peer_id
    with pytest.raises(PeerVanished) as caught:
        await stream.receive_some()
    assert caught.value.peer_id == bob_id
    with pytest.raises(PeerVanished):
        await stream.send_all(b"x")


async def test_visitors_who_left_leave_nothing_behind(start_host: StartHost) -> None:
    """libp2p keeps a task for each, and one of its 512 places for incoming connections, until it stops."""
    bob = await start_host(HostConfig(listen=LOOPBACK.listen, max_connections=2))
    bob.serve(ECHO, echo)
    left, leaving = trio.open_memory_channel[str](1)
    bob.when_disconnected(left.send_nowait)
    for _ in range(6):
        async with (
            open_host(new_identity(), HostConfig(listen=())) as visitor,
            await visitor.open_stream(bob.peer_id, ECHO, bob.addrs),
        ):
            pass
        assert await leaving.receive() == visitor.peer_id


async def test_one_peer_has_so_many_connections_and_no_more(start_host: StartHost) -> None:
    """The surplus ones are closed, and the peer is served on what is left."""
    bob = await start_host(HostConfig(listen=LOOPBACK.listen, max_connections_per_peer=2))
    bob.serve(ECHO, echo)
    alice = await start_host()
    dialled = Multiaddr(bob.addrs[0].partition("/p2p/")[0])
    for _ in range(5):
        await alice.libp2p.get_network().dial_addr(dialled, ID.from_base58(bob.peer_id))
    with trio.fail_after(60):
        for one, other in ((bob, alice), (alice, bob)):
            while len(one.libp2p.get_network().connections[ID.from_base58(other.peer_id)]) > 2:
                await trio.sleep(0.01)
    async with await alice.open_stream(bob.peer_id, ECHO) as stream:
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"


async def test_no_limit_but_ours_keeps_connections_out(start_host: StartHost) -> None:
    """libp2p has limits of its own, such as 8 of one peer and 256 that come in, and says nothing."""
    generous = HostConfig(listen=LOOPBACK.listen, max_connections_per_peer=12)
    alice, bob = await start_host(generous), await start_host(generous)
    dialled = Multiaddr(bob.addrs[0].partition("/p2p/")[0])
    for _ in range(12):
        await alice.libp2p.get_network().dial_addr(dialled, ID.from_base58(bob.peer_id))
    with trio.fail_after(60):
        while len(bob.libp2p.get_network().connections[ID.from_base58(alice.peer_id)]) < 12:
            await trio.sleep(0.01)
    assert len(alice.libp2p.get_network().connections[ID.from_base58(bob.peer_id)]) == 12


async def test_a_ping_measures_the_round_trip(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    with pytest.raises(PeerUnreachable, match="not connected"):
        await alice.ping(bob.peer_id)
    assert alice.rtt_s(bob.peer_id) is None
    await alice.connect(bob.peer_id, bob.addrs)
    assert 0 < await alice.ping(bob.peer_id) < 1
    rtt_s = alice.rtt_s(bob.peer_id)
    assert rtt_s is not None
    assert 0 < rtt_s < 1


async def test_both_sides_expect_a_round_trip_before_they_have_measured_one(start_host: StartHost) -> None:
    """Else a connection that has just been made has the patience of one that takes no time."""
    alice, bob = await start_host(), await start_host()
    await alice.connect(bob.peer_id, bob.addrs)
    while alice.peer_id not in bob.connected_peers():
        await trio.sleep(0.01)
    for one, other in ((alice, bob), (bob, alice)):
        connection: Any = one.libp2p.get_network().connections[ID.from_base58(other.peer_id)][0]
        assert connection.muxed_conn.secured_conn.raw.expected_rtt_s > 0


async def test_a_ping_that_is_not_answered_fails(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = await start_host(HostConfig(listen=(), stream_timeout_s=0.1))
    bob = await start_host()
    await alice.connect(bob.peer_id, bob.addrs)

    def ignore(*_: int) -> None:
        pass

    [connection] = bob.libp2p.get_network().connections[ID.from_base58(alice.peer_id)]
    monkeypatch.setattr(connection.muxed_conn, "answer", ignore)
    with pytest.raises(PeerUnreachable, match="does not answer"):
        await alice.ping(bob.peer_id)


# ---------------------------------------------------------------------- starting and stopping


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("/ip4/127.0.0.1", "not of the form"),
        ("nonsense", "not of the form"),
        ("/ip4/300.0.0.1/tcp/1", "not permitted|300"),
        ("/ip4/127.0.0.1/tcp/70000", "65535"),
        ("/ip4/203.0.113.77/tcp/0", "does not have that address"),
        ("/dns4/localhost/tcp/0", "give /ip4"),
        ("/ip4/127.0.0.1/tcp/0/p2p/12D3KooWBny6jbU4SmjVmbw5qgDyZWFvgdKTmkeM2G2zPUvZoHwr", "give /ip4"),
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_named(address: str, why: str) -> None:
    with pytest.raises(AddressUnusable, match=why):
        async with open_host(new_identity(), HostConfig(listen=(address,))):
            pytest.fail("it listens")


async def test_a_port_that_is_taken_is_named_even_by_a_host_of_ours(start_host: StartHost) -> None:
    """Two sockets with SO_REUSEPORT, as libp2p opens them, would share the port without a word."""
    first = await start_host()
    address = first.addrs[0].partition("/p2p/")[0]
    with pytest.raises(AddressUnusable, match="taken"):
        async with open_host(new_identity(), HostConfig(listen=(address,))):
            pytest.fail("it listens")


async def test_an_address_lost_between_check_and_bind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def pass_all(_: object) -> None:
        pass

    monkeypatch.setattr("p2pinfer.node.host.host.check_listen", pass_all)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(AddressUnusable, match="another process has just taken the port"),
    ):
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        async with open_host(new_identity(), HostConfig(listen=(address,))):
            pytest.fail("it listens")


async def test_a_host_ends_at_once_and_leaves_neither_tasks_nor_threads(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when cancelled in the middle of things, as by Ctrl-C."""
    before = threading.active_count()

    async def live(cancel: bool) -> None:
        with trio.CancelScope() as scope:
            async with (
                open_host(new_identity(), LOOPBACK) as alice,
                open_host(new_identity(), LOOPBACK) as bob,
            ):
                bob.serve(ECHO, echo)
                stream = await alice.open_stream(bob.peer_id, ECHO, bob.addrs)
                await stream.send_all(b"x")
                if cancel:
                    scope.cancel()
                    await trio.sleep_forever()

    with trio.fail_after(60), caplog.at_level(logging.WARNING):
        tasks = len(_all_tasks())
        await live(cancel=False)
        await live(cancel=True)
        await trio.testing.wait_all_tasks_blocked()
        assert len(_all_tasks()) == tasks
    assert threading.active_count() == before
    # libp2p calls a hung-up peer an error; see library_logs.py for what becomes of that.
    assert [record for record in caplog.records if not record.name.startswith("libp2p")] == []
    assert capfd.readouterr().err == ""


def _all_tasks() -> list[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    assert root
    found: list[trio.lowlevel.Task] = []
    todo = [root]
    while todo:
        task = todo.pop()
        found.append(task)
        todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return found


async def test_an_exception_in_the_body_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with open_host(new_identity(), LOOPBACK):
            raise KeyError("mine")


async def test_plaintext_is_refused(start_host: StartHost) -> None:
    bob = await start_host()
    key_pair = new_identity().key_pair
    plain = new_host(
        key_pair=key_pair, sec_opt={TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(key_pair)}
    )
    async with plain.run([]):
        address = Multiaddr(bob.addrs[0].partition("/p2p/")[0])
        with pytest.raises(BaseLibp2pError):
            await plain.get_network().dial_addr(address, ID.from_base58(bob.peer_id))
