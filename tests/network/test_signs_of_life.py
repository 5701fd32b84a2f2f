"""Signs of life of a peer that is being sent a lot, and of one that is gone, over real connections."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from p2pinfer.node.host.host import Host
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.link import Link
from p2pinfer.node.protocol.messages import Filled, Probe
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.transport.yamux import YamuxConnection

from .support import StartHost

PROTOCOL = "/p2pinfer/test/1.0.0"


async def stream_to(alice: Host, bob: Host) -> PeerStream:
    """A stream to a peer that never reads it."""

    async def ignore(stream: PeerStream) -> None:
        await trio.sleep_forever()

    bob.serve(PROTOCOL, ignore)
    return await alice.open_stream(bob.peer_id, PROTOCOL, bob.addrs)


async def nothing(filled: Filled) -> None: ...


def deafen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody answer a ping any more, as a peer whose packets are lost."""

    def swallow(self: Any, *_: object) -> None: ...

    monkeypatch.setattr(YamuxConnection, "answer", swallow)


async def test_a_peer_whose_window_is_full_answers_all_the_same(start_host: StartHost) -> None:
    """Its stream takes nothing in, so a question on it would wait for ever."""
    alice, bob = await start_host(), await start_host()
    stream = await stream_to(alice, bob)
    frames = FrameStream(stream, max_payload_bytes=0, peer_id=bob.peer_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.muxed.write, bytes(1 << 20))
        while frames.sent_bytes < 1 << 18:
            await trio.sleep(0.01)
        assert await frames.is_answered(60.0)
        with trio.move_on_after(0.2) as patience:
            await frames.send(Probe(0))
        assert patience.cancelled_caught
        nursery.cancel_scope.cancel()


async def test_a_successor_that_does_not_answer_loses_its_connection(
    start_host: StartHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = await start_host(), await start_host()
    frames = FrameStream(await stream_to(alice, bob), max_payload_bytes=0, peer_id=bob.peer_id)
    link = Link(frames, nothing)
    assert await link.is_there(60.0)
    deafen(monkeypatch)
    assert not await link.is_there(0.1)
    with trio.fail_after(60):
        while alice.connection_kind(bob.peer_id) is not None:
            await trio.sleep(0.01)
