"""What goes to whom: steps to the successor, confirmations to whoever replays, refusals to the client."""

from __future__ import annotations

import trio
import trio.testing

from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.link import Link
from p2pinfer.node.protocol.messages import End, Filled, Message, Moved, Open, Refused, Step, Successor
from p2pinfer.node.serve.neighbours import Neighbours


def pair(peer_id: str) -> tuple[FrameStream, FrameStream]:
    """Our end of a stream to a peer, and the peer's."""
    ours, theirs = trio.testing.memory_stream_pair()
    return (
        FrameStream(ours, max_payload_bytes=100, peer_id=peer_id),
        FrameStream(theirs, max_payload_bytes=100),
    )


async def received(stream: FrameStream) -> tuple[Message, bytes]:
    message, payload = await stream.receive()
    return message, bytes(payload)


def neighbours_of_a_hop() -> tuple[Neighbours, FrameStream]:
    """Between a client that feeds it and a successor that it has no link to; with the client's end."""
    ours, client = pair("client")
    opening = Open(b"s" * 16, "r", 0, 1, 64, "float32", successor=Successor("b"))
    return Neighbours(opening, "client", ours), client


def linked(neighbours: Neighbours, peer_id: str) -> tuple[Link, FrameStream]:
    ours, theirs = pair(peer_id)
    return Link(ours, neighbours.confirm_to_replayer), theirs


def step(number: int, epoch: int = 0) -> Step:
    return Step(number, epoch, number, 1, 1)


async def test_a_step_goes_out_on_the_link_there_is_and_after_a_switch_only_of_its_epoch() -> None:
    neighbours, _ = neighbours_of_a_hop()
    await neighbours.send_to_successor(step(0), b"nobody")
    neighbours.link, first = linked(neighbours, "b")
    await neighbours.send_to_successor(step(1), b"first")
    assert await received(first) == (step(1), b"first")
    link, second = linked(neighbours, "c")
    former = neighbours.switch(link, 2)
    assert former is not None and former.peer_id == "b"
    await neighbours.send_to_successor(step(2, epoch=1), b"too old")
    await neighbours.send_to_successor(step(3, epoch=2), b"second")
    assert await received(second) == (step(3, epoch=2), b"second")


async def test_no_step_goes_out_while_the_link_moves() -> None:
    neighbours, _ = neighbours_of_a_hop()
    neighbours.link, _ = linked(neighbours, "b")
    link, later = linked(neighbours, "b")
    async with trio.open_nursery() as nursery:
        async with neighbours.pausing:
            nursery.start_soon(neighbours.send_to_successor, step(0), b"")
            await trio.testing.wait_all_tasks_blocked()
            neighbours.link = link
        assert await received(later) == (step(0), b"")
    await neighbours.end_links()
    assert (await later.receive())[0] == End()
    await link.aclose()


async def test_the_client_is_told_of_a_link_that_breaks_and_not_of_a_standby() -> None:
    neighbours, client = neighbours_of_a_hop()
    neighbours.link, theirs = linked(neighbours, "b")
    neighbours.standby, _ = linked(neighbours, "c")
    await neighbours.lose(neighbours.standby, "cut")
    assert neighbours.standby is None
    await theirs.aclose()
    await neighbours.send_to_successor(step(0), b"")
    assert neighbours.link is None
    refused = (await client.receive())[0]
    assert isinstance(refused, Refused)
    assert (refused.code, refused.peer_id) == ("successor_vanished", "b")


async def test_a_confirmation_goes_back_to_whoever_replayed_last() -> None:
    neighbours, client = neighbours_of_a_hop()
    await neighbours.confirm_to_replayer(Filled(0))  # to nobody
    ours, theirs = pair("b")
    neighbours.expect("b")
    assert neighbours.takes_from(ours, is_replay=True)
    await neighbours.confirm_to_replayer(Filled(1))
    assert (await theirs.receive())[0] == Filled(1)
    await theirs.aclose()
    await neighbours.confirm_to_replayer(Filled(2))  # it is gone, and that ends nothing
    assert neighbours.takes_from(neighbours.control, is_replay=True)
    await neighbours.confirm_to_replayer(Filled(3))
    assert (await client.receive())[0] == Filled(3)


async def test_a_client_that_goes_on_elsewhere_is_talked_with_there() -> None:
    neighbours, client = neighbours_of_a_hop()
    ours, theirs = pair("client")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbours.go_on_at, ours)
        assert (await theirs.receive())[0] == Moved()
        assert (await client.receive())[0] == End()
        await neighbours.refuse("busy", "for no reason")
        assert isinstance((await theirs.receive())[0], Refused)
        neighbours.leave()
