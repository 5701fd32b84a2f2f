import pytest
import trio
import trio.testing

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.protocol.frames import FrameStream, MinimumRate, encode_header
from p2pinfer.node.protocol.messages import Attached, End, Step


def frame_pair(limit: int = 1 << 20) -> tuple[FrameStream, FrameStream]:
    ours, theirs = trio.testing.memory_stream_pair()
    return (
        FrameStream(ours, max_payload_bytes=limit, peer_id="us"),
        FrameStream(theirs, max_payload_bytes=limit, peer_id="them"),
    )


async def test_frames_arrive_whole_however_the_bytes_are_cut() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    frames = FrameStream(theirs, max_payload_bytes=100)
    step = Step(7, 0, 3, 2, 1)
    sent = (encode_header(step, 5) + b"abcde") * 2
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for byte in sent:
                await ours.send_all(bytes([byte]))

        nursery.start_soon(send)
        for _ in range(2):
            assert await frames.receive() == (step, bytearray(b"abcde"))


async def test_frames_of_concurrent_senders_do_not_mix() -> None:
    ours, theirs = frame_pair()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(ours.send, Step(number, 0, 0, 1, 1), bytes([number]) * 1000)
        received = [await theirs.receive() for _ in range(20)]
    assert sorted(m.number for m, _ in received if isinstance(m, Step)) == list(range(20))
    assert all(isinstance(m, Step) and set(payload) == {m.number} for m, payload in received)


@pytest.mark.parametrize("header_bytes, payload_bytes", [(1 << 17, 0), (4, 1 << 30)])
async def test_an_oversized_frame_is_refused_before_memory_is_taken(
    header_bytes: int, payload_bytes: int
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    frames = FrameStream(theirs, max_payload_bytes=1000, peer_id="mallory")
    await ours.send_all(header_bytes.to_bytes(4, "big") + payload_bytes.to_bytes(4, "big"))
    with pytest.raises(ProtocolViolation, match="at most") as caught:
        await frames.receive()
    assert caught.value.peer_id == "mallory"


async def test_a_payload_where_none_belongs_is_refused() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all(encode_header(Attached(), 3) + b"abc")
    with pytest.raises(ProtocolViolation, match="Attached with a payload"):
        await FrameStream(theirs, max_payload_bytes=10).receive()


async def test_a_header_that_is_no_message_names_the_peer() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all((2).to_bytes(4, "big") + (0).to_bytes(4, "big") + b"\xff\xff")
    with pytest.raises(ProtocolViolation) as caught:
        await FrameStream(theirs, max_payload_bytes=10, peer_id="mallory").receive()
    assert caught.value.peer_id == "mallory"


@pytest.mark.parametrize("sent, what", [(b"", "end marker"), (b"\0\0", "middle of a frame")])
async def test_a_stream_that_just_stops_is_a_peer_that_vanished(sent: bytes, what: str) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    if sent:
        await ours.send_all(sent)
    await ours.aclose()
    with pytest.raises(PeerVanished, match=what):
        await FrameStream(theirs, max_payload_bytes=10).receive()


async def test_end_is_said_once_and_quietly_when_the_peer_is_gone() -> None:
    ours, theirs = frame_pair()
    await ours.end()
    await ours.end()
    assert await theirs.receive() == (End(), bytearray())
    await theirs.end()
    with pytest.raises(PeerVanished):
        await ours.send(End())
    with pytest.raises(PeerVanished):
        await ours.receive()


# ---------------------------------------------------------------------- the rate

RATE = MinimumRate(grace_s=10.0, bytes_per_s=100.0)


async def test_a_frame_that_comes_a_byte_at_a_time_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    frame = encode_header(Attached(), 0)

    async def drip() -> None:
        for byte in frame:
            await trio.sleep(4)
            await ours.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        began_at = trio.current_time()
        with pytest.raises(ProtocolViolation, match="too slowly"):
            await FrameStream(theirs, max_payload_bytes=10, peer_id="mallory", minimum_rate=RATE).receive()
        assert trio.current_time() - began_at < 4 + RATE.limit_s(len(frame)) + 0.1
        nursery.cancel_scope.cancel()


async def test_a_pause_between_frames_may_be_as_long_as_it_likes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    frames = FrameStream(theirs, max_payload_bytes=10, minimum_rate=RATE)

    async def pause() -> None:
        await trio.sleep(1000)
        await ours.send_all(encode_header(Attached(), 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pause)
        assert await frames.receive() == (Attached(), bytearray())


async def test_a_large_frame_may_take_its_time(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    step = Step(0, 0, 0, 1, 1)

    async def trickle() -> None:
        frame = encode_header(step, 2000) + bytes(2000)
        for at in range(0, len(frame), 100):
            await trio.sleep(1)
            await ours.send_all(frame[at : at + 100])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trickle)
        received = await FrameStream(theirs, max_payload_bytes=2000, minimum_rate=RATE).receive()
    assert received == (step, bytearray(2000))


async def test_a_reader_that_takes_nothing_in_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    frames = FrameStream(ours, max_payload_bytes=10, peer_id="mallory", minimum_rate=RATE)
    began_at = trio.current_time()
    with pytest.raises(PeerVanished, match="took no frame in within 10 s") as caught:
        await frames.send(Attached())
    assert caught.value.peer_id == "mallory"
    assert trio.current_time() - began_at == pytest.approx(10, abs=1)
    with pytest.raises(PeerVanished):
        await frames.send(Attached())
    await theirs.aclose()


async def test_a_flood_of_small_frames_leaves_others_their_turn() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all(encode_header(Attached(), 0) * 1000)
    frames = FrameStream(theirs, max_payload_bytes=10)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        for _ in range(1000):
            await frames.receive()
        nursery.cancel_scope.cancel()
    assert turns > 900
