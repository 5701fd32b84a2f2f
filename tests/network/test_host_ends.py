"""Real hosts on loopback: limits, visitors, pings, and how a host ends."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import pytest
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from multiaddr import Multiaddr

from p2pinfer.errors import PeerError, PeerRefused, PeerUnreachable, PeerVanished
from p2pinfer.node.host.host import HostConfig, open_host
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream

from .support import ECHO, LOOPBACK, StartHost, accept, echo, receive_exactly


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


async def test_notifees_hear_of_connections_and_not_of_streams(start_host: StartHost) -> None:
    alice, bob = await start_host(), await start_host()
    bob.serve(ECHO, echo)
    heard: list[str] = []

    class Notifee:
        def __getattr__(self, event: str) -> Any:
            async def note(*_: object) -> None:
                await trio.lowlevel.checkpoint()
                heard.append(event)

            return note

    network: Any = alice.libp2p.get_network()
    network.register_notifee(Notifee())
    async with await alice.open_stream(bob.peer_id, ECHO, bob.addrs) as stream:
        await stream.send_all(b"hello")
        await receive_exactly(stream, 5)
    assert heard == ["connected"]
