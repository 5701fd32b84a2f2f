"""Streams between real hosts: flow control, cancellation, errors, and bulk."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from libp2p import new_host
from libp2p.abc import INetStream
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

from p2pinfer.errors import PeerVanished
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.transport.yamux import YamuxConnection
from p2pinfer.node.transport.yamux_frames import INITIAL_WINDOW

from .support import ECHO, StartHost, accept, echo, receive_exactly

Pair = tuple[PeerStream, PeerStream]


async def still_works(hosts: tuple[Host, Host]) -> bool:
    """Whether the connection carries new streams both ways."""
    for opener, server in (hosts, hosts[::-1]):
        server.serve(ECHO, echo)
        async with await opener.open_stream(server.peer_id, ECHO) as stream:
            await stream.send_all(b"alive")
            if await receive_exactly(stream, 5) != b"alive":
                return False
    return True


async def test_it_is_a_stream_as_trio_means_it(hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    accepted = accept(far, "/pair")

    async def make() -> Pair:
        stream = await near.open_stream(far.peer_id, "/pair")
        return stream, await accepted.receive()

    await trio.testing.check_two_way_stream(make, None)


async def test_a_slow_reader_slows_the_writer_down_and_breaks_nothing(
    pair: Pair, hosts: tuple[Host, Host]
) -> None:
    near, far = pair
    sent = 0

    async def send() -> None:
        nonlocal sent
        for _ in range(64):
            await near.send_all(bytes(65536))
            sent += 65536

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while sent < INITIAL_WINDOW - 65536 - 100:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert sent < INITIAL_WINDOW  # it waits, and others do not
        assert await still_works(hosts)
        assert len(await receive_exactly(far, 64 * 65536)) == 64 * 65536


async def test_both_sides_can_send_a_lot_at_once(pair: Pair) -> None:
    size = 4 << 20

    async def exchange(stream: PeerStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(size))
            assert len(await receive_exactly(stream, size)) == size

    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange, pair[0])
        nursery.start_soon(exchange, pair[1])


async def test_bulk_arrives_as_it_was_sent(pair: Pair) -> None:
    near, far = pair
    content = bytes(range(256)) * 4096 * 16  # 16 MB

    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.send_all, memoryview(content))
        assert await receive_exactly(far, len(content)) == content


async def test_many_streams_share_a_connection(hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    far.serve(ECHO, echo)

    async def talk(number: int) -> None:
        content = number.to_bytes(4, "big") * 5000
        async with await near.open_stream(far.peer_id, ECHO) as stream:
            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, content)
                    assert await receive_exactly(stream, len(content)) == content

    async with trio.open_nursery() as nursery:
        for number in range(60):
            nursery.start_soon(talk, number)


async def test_a_cancelled_send_resets_its_stream_and_leaves_the_connection_alone(
    hosts: tuple[Host, Host],
) -> None:
    """libp2p's own muxer loses the whole connection after one or two of these."""
    near, far = hosts
    accepted = accept(far, "/pair")
    for _ in range(12):
        stream = await near.open_stream(far.peer_id, "/pair")
        other_end = await accepted.receive()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(8 << 20))
                await receive_exactly(other_end, 100_000)
                scope.cancel()
        with pytest.raises(PeerVanished):
            await receive_exactly(other_end, 8 << 20)
        with pytest.raises(PeerVanished):
            await stream.send_all(b"more")
    assert await still_works(hosts)


async def test_a_send_cancelled_before_anything_went_out_leaves_the_stream_usable(pair: Pair) -> None:
    near, far = pair
    filling = INITIAL_WINDOW - near.muxed.bytes_sent  # some went to negotiate the protocol
    await near.send_all(bytes(filling))
    with trio.move_on_after(0.01):
        await near.send_all(b"waits for the window")
    with trio.CancelScope() as scope:
        scope.cancel()
        await near.send_all(b"does not begin")
    await receive_exactly(far, filling)
    await near.send_all(b"again")
    assert await receive_exactly(far, 5) == b"again"


async def test_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    near, far = pair
    with trio.move_on_after(0.01):
        await far.receive_some()
    await near.send_all(b"late")
    assert await receive_exactly(far, 4) == b"late"


async def test_an_end_is_told_from_a_reset(pair: Pair, hosts: tuple[Host, Host]) -> None:
    near, far = pair
    await near.send_all(b"last words")
    await near.aclose()
    assert await receive_exactly(far, 100) == b"last words"
    assert await far.receive_some() == b""
    with pytest.raises(PeerVanished):
        while True:
            await far.send_all(b"anybody there?")


async def test_what_arrived_before_a_reset_can_still_be_read(pair: Pair) -> None:
    near, far = pair
    await near.send_all(b"last words")
    await near.reset()
    await near.reset()
    assert await receive_exactly(far, 10) == b"last words"
    with pytest.raises(PeerVanished) as caught:
        await far.receive_some()
    assert isinstance(caught.value, trio.BrokenResourceError)
    assert caught.value.__cause__ is not None


async def test_an_unread_stream_that_is_closed_is_reset(pair: Pair) -> None:
    near, far = pair
    await near.send_all(b"nobody reads this")
    while not far.muxed.has_input():
        await trio.lowlevel.checkpoint()
    await far.aclose()
    with pytest.raises(PeerVanished):
        await near.receive_some()


async def test_two_tasks_may_not_do_the_same_at_once(pair: Pair) -> None:
    near, _ = pair
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.receive_some)
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(trio.BusyResourceError):
            await near.receive_some()
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.send_all, bytes(1 << 20))
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(trio.BusyResourceError):
            await near.send_all(b"x")
        with pytest.raises(trio.BusyResourceError):
            await near.wait_send_all_might_not_block()
        nursery.cancel_scope.cancel()


async def test_closing_wakes_whoever_uses_the_stream(pair: Pair) -> None:
    near, _ = pair

    async def receive() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await near.receive_some()

    async def send() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await near.send_all(bytes(1 << 20))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.01)
        await near.aclose()
        await near.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await near.send_all(b"x")


async def test_a_window_grows_when_the_round_trip_is_what_limits(pair: Pair) -> None:
    near, far = pair
    connection = far.muxed.muxed_conn
    assert isinstance(connection, YamuxConnection)
    connection.rtt_s = 10.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.send_all, bytes(8 << 20))
        await receive_exactly(far, 8 << 20)
    assert far.muxed.window == 4 << 20
    assert near.muxed.window == INITIAL_WINDOW


@pytest.mark.parametrize("we_dial", [True, False])
async def test_libp2ps_own_hosts_are_understood(start_host: StartHost, we_dial: bool) -> None:
    """The same protocols on the wire: identify, multistream, yamux; streams opened from either side."""
    ours = await start_host()
    key_pair = new_identity().key_pair
    noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    theirs = new_host(key_pair=key_pair, sec_opt={NOISE: noise})
    their_id, our_id = theirs.get_id(), ID.from_base58(ours.peer_id)

    async def echo_theirs(stream: INetStream) -> None:
        while received := await stream.read(65536):
            await stream.write(received)

    ours.serve(ECHO, echo)
    theirs.set_stream_handler(TProtocol(ECHO), echo_theirs)
    size = 2 << 20
    async with theirs.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        if we_dial:
            await ours.connect(str(their_id), [str(theirs.get_transport_addrs()[0])])
        else:
            await theirs.get_network().dial_addr(Multiaddr(ours.addrs[0].partition("/p2p/")[0]), our_id)
        async with await ours.open_stream(str(their_id), ECHO) as stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(size))
            assert len(await receive_exactly(stream, size)) == size
        plain = await theirs.new_stream(our_id, [TProtocol(ECHO)])
        await plain.write(b"hello")
        assert await plain.read(5) == b"hello"
        await plain.close()
        assert 0 < await ours.ping(str(their_id)) < 5
        await theirs.close()  # or it forgets its sockets
