"""Sending without waiting: over real hosts, in order with everything else, and only when it can be done."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.node.host.host import Host
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import Probe, Result
from p2pinfer.node.transport import yamux
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.transport.yamux_frames import INITIAL_WINDOW, MAX_PAYLOAD

from .support import accept, receive_exactly

Pair = tuple[PeerStream, PeerStream]


@pytest.fixture(autouse=True)
def whole_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy looks like a thin line, whose frames are smaller."""

    def largest(bytes_per_s: float, rtt_s: float) -> int:
        return MAX_PAYLOAD

    monkeypatch.setattr(yamux, "frame_bytes", largest)


async def test_what_is_sent_at_once_arrives_in_order_with_the_rest(pair: Pair) -> None:
    near, far = pair
    expected = b""
    at_once = 0
    for number in range(50):
        piece = bytes([number]) * 777
        if number % 3 and near.send_now(piece):
            at_once += 1
        else:
            await near.send_all(piece)
        expected += piece
    assert at_once > 20
    assert await receive_exactly(far, len(expected)) == expected


async def test_what_is_too_long_or_beyond_the_window_has_to_wait(pair: Pair) -> None:
    near, far = pair
    assert not near.send_now(bytes(MAX_PAYLOAD + 1))
    sent = 0
    while near.send_now(bytes(MAX_PAYLOAD)):
        sent += MAX_PAYLOAD
    assert 0 < sent <= INITIAL_WINDOW
    assert not near.send_now(bytes(MAX_PAYLOAD))
    assert await receive_exactly(far, sent) == bytes(sent)
    await near.send_all(b"end")
    assert await receive_exactly(far, 3) == b"end"


async def test_what_the_socket_does_not_take_arrives_all_the_same(hosts: tuple[Host, Host]) -> None:
    """More streams than the socket has room for, none of which waits."""
    near, far = hosts
    accepted = accept(far, "/pair")
    pairs = [(await near.open_stream(far.peer_id, "/pair"), await accepted.receive()) for _ in range(64)]
    counts = [0] * len(pairs)
    for index, (stream, _) in enumerate(pairs):
        while stream.send_now(bytes([index]) * MAX_PAYLOAD):
            counts[index] += 1
    assert counts[0] > 0
    assert counts[-1] == 0  # the socket was full by then
    with trio.fail_after(60):
        for index, (_, stream) in enumerate(pairs):
            for _ in range(counts[index]):
                assert await receive_exactly(stream, MAX_PAYLOAD) == bytes([index]) * MAX_PAYLOAD


async def test_nothing_is_sent_at_once_on_a_stream_that_is_over(pair: Pair) -> None:
    near, far = pair
    await far.reset()
    while near.send_now(b"x"):
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert not near.send_now(b"x")
    await near.aclose()
    assert not near.send_now(b"x")


async def test_frames_go_at_once_unless_another_is_on_its_way(pair: Pair) -> None:
    near, far = pair
    ours = FrameStream(near, max_payload_bytes=0)
    theirs = FrameStream(far, max_payload_bytes=1 << 24)
    payload = bytes(2 * INITIAL_WINDOW)
    async with trio.open_nursery() as nursery:
        await ours.send(Probe(1, 0))
        nursery.start_soon(ours.send, Result(0, 0, 1, (), ()), payload)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not ours.send_now(Probe(2, 0))
        assert (await theirs.receive())[0] == Probe(1, 0)
        assert (await theirs.receive())[1] == payload
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert ours.send_now(Probe(3, 0))
    assert (await theirs.receive())[0] == Probe(3, 0)
