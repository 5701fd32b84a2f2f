"""How a connection must begin: with the greeting, in the clear or under the swarm's key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError

from p2pinfer.node.transport.private_network import GREETING, Guarded, StrangerMet
from p2pinfer.node.transport.raw_stream import RawStream

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


class Pipe(RawStream):
    """One end of a pipe."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__()
        self._stream = stream

    async def _receive(self) -> bytes:
        received = await self._stream.receive_some(None)
        if not received:
            raise ConnectionClosedError("closed")
        return bytes(received)

    async def _send_some(self, outbox: bytearray) -> None:
        sent = bytes(outbox)
        del outbox[: len(sent)]
        await self._stream.send_all(sent)

    async def close(self) -> None:
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        return ("192.0.2.9", 4001)


class Met:
    """Two ends, and the strangers each has told of."""

    def __init__(self, our_key: bytes | None, their_key: bytes | None) -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        self.told: list[tuple[str, str, str]] = []
        self.ours = Guarded(Pipe(ours), our_key, lambda at, why: self.told.append(("we", at, why)))
        self.theirs = Guarded(Pipe(theirs), their_key, lambda at, why: self.told.append(("they", at, why)))
        self.their_pipe = theirs


async def read_exactly(read: Callable[[int | None], Awaitable[bytes]], size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += await read(size - len(received))
    return received


@pytest.mark.parametrize("key", [None, KEY])
async def test_members_hear_each_other(key: bytes | None) -> None:
    met = Met(key, key)
    for message in (GREETING, b"hello", b"x" * 100_000):
        await met.ours.write(message)
        await met.theirs.write(message)
        assert await read_exactly(met.theirs.read, len(message)) == message
        assert await read_exactly(met.ours.read, len(message)) == message
    await met.ours.close()
    with pytest.raises(ConnectionClosedError, match="closed"):
        await met.theirs.read()
    assert met.told == []
    assert met.theirs.get_remote_address() == ("192.0.2.9", 4001)


async def test_nothing_of_a_private_swarm_travels_in_the_clear() -> None:
    met = Met(KEY, KEY)
    await met.ours.write(GREETING)
    await met.ours.write(b"a secret")
    seen = await met.their_pipe.receive_some()
    assert len(seen) == 24 + len(GREETING) + len(b"a secret")
    assert b"multistream" not in seen
    assert b"secret" not in seen


@pytest.mark.parametrize(
    "our_key, their_key, what_we_see, what_they_see",
    [
        (KEY, None, "it lacks the key of this private swarm", "a private swarm whose key we lack"),
        (None, KEY, "a private swarm whose key we lack", "it lacks the key of this private swarm"),
        (KEY, OTHER_KEY, "it has another key", "it has another key"),
    ],
)
async def test_strangers_are_told_at_once_on_both_sides(
    our_key: bytes | None, their_key: bytes | None, what_we_see: str, what_they_see: str
) -> None:
    met = Met(our_key, their_key)
    await met.ours.write(GREETING)
    await met.theirs.write(GREETING)
    with trio.fail_after(60):
        with pytest.raises(StrangerMet, match=what_we_see):
            await met.ours.read(1)
        with pytest.raises(StrangerMet, match=what_they_see):
            await met.theirs.read(1)
    assert [(who, address) for who, address, _ in met.told] == [("we", "192.0.2.9"), ("they", "192.0.2.9")]


@pytest.mark.parametrize("key", [None, KEY])
async def test_what_comes_byte_by_byte_is_understood(key: bytes | None) -> None:
    met, sent = Met(key, key), Met(key, key)
    await sent.theirs.write(GREETING)
    await sent.theirs.write(b"!")

    async def drip(data: bytes) -> None:
        for byte in data:
            await met.their_pipe.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip, await sent.ours.inner.read())
        assert await read_exactly(met.ours.read, len(GREETING) + 1) == GREETING + b"!"


async def test_another_protocol_is_recognised_by_its_first_byte() -> None:
    met = Met(None, None)
    await met.their_pipe.send_all(b"G")
    with trio.fail_after(60), pytest.raises(StrangerMet, match="speaks no libp2p"):
        await met.ours.read(20)


async def test_a_peer_that_hangs_up_before_it_has_begun_is_no_stranger() -> None:
    met = Met(KEY, KEY)
    await met.their_pipe.send_all(b"\x13/mult")
    await met.their_pipe.aclose()
    with pytest.raises(ConnectionClosedError, match="closed") as caught:
        await met.ours.read()
    assert not isinstance(caught.value, StrangerMet)
    assert met.told == []


@pytest.mark.parametrize("key", [None, KEY])
async def test_what_is_written_at_once_is_enciphered_like_the_rest(key: bytes | None) -> None:
    met = Met(key, key)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(met.theirs.write, GREETING)
        assert await read_exactly(met.ours.read, len(GREETING)) == GREETING
    await met.ours.write(GREETING)
    assert met.ours.is_clear
    assert met.ours.write_now(b"first ")
    assert not met.ours.is_clear
    assert not met.ours.write_now(b"never")
    await met.ours.write(b"second")
    expected = GREETING + b"first second"
    assert await read_exactly(met.theirs.read, len(expected)) == expected
