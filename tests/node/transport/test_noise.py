"""Noise messages, with libp2p's own implementation at the other end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import trio
from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from noise.connection import NoiseConnection

from p2pinfer.node.transport.noise import NoiseMessages, NoiseSession


class Pipe:
    """Keeps what is written, and gives it out in pieces of the sizes asked for, the rest at once."""

    def __init__(self, sizes: Sequence[int] = ()) -> None:
        self.written = bytearray()
        self.is_clear = True
        self._sizes = list(sizes)

    def write_now(self, data: bytes) -> bool:
        assert self.is_clear
        self.written += data
        return True

    async def write(self, data: bytes) -> None:
        self.written += data

    async def read(self, n: int | None = None) -> bytes:
        if not self.written:
            raise ConnectionClosedError("nothing more comes")
        size = self._sizes.pop(0) if self._sizes else len(self.written)
        piece = bytes(self.written[: min(size, n or size)])
        del self.written[: len(piece)]
        return piece


def handshaken() -> tuple[Any, Any]:
    """The states of two sides that have shaken hands."""
    ours, theirs = (NoiseConnection.from_name(b"Noise_NN_25519_ChaChaPoly_SHA256") for _ in range(2))
    ours.set_as_initiator()
    theirs.set_as_responder()
    for side in (ours, theirs):
        side.start_handshake()
    theirs.read_message(bytes(ours.write_message()))
    ours.read_message(bytes(theirs.write_message()))
    return ours, theirs


def sides(pipe: Pipe) -> tuple[NoiseMessages, NoiseTransportReadWriter]:
    """Both at the same pipe: what one writes the other reads."""
    ours, theirs = handshaken()
    connection = RawConnection(cast(Any, pipe), True)
    return NoiseMessages(NoiseTransportReadWriter(connection, ours)), NoiseTransportReadWriter(
        connection, theirs
    )


@given(
    st.lists(st.binary(max_size=300), min_size=1, max_size=8),
    st.lists(st.integers(1, 700), max_size=40),
)
def test_what_libp2p_writes_is_read_however_it_is_cut(messages: list[bytes], sizes: list[int]) -> None:
    async def check() -> None:
        ours, theirs = sides(Pipe(sizes))
        for message in messages:
            await theirs.write_msg(message)
        assert [await ours.read_msg() for _ in messages] == messages
        with pytest.raises(ConnectionClosedError):
            await ours.read_msg()

    trio.run(check)


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=8))
def test_what_we_write_is_read_by_libp2p(messages: list[bytes]) -> None:
    async def check() -> None:
        ours, theirs = sides(Pipe())
        for message in messages:
            await ours.write_msg(message)
        assert [await theirs.read_msg() for _ in messages] == messages

    trio.run(check)


async def test_what_is_too_long_for_one_message_goes_in_several() -> None:
    ours, theirs = sides(Pipe())
    data = bytes(range(256)) * 600
    await ours.write_msg(data)
    received = [await theirs.read_msg() for _ in range(3)]
    assert [len(each) for each in received] == [MAX_PLAINTEXT_LENGTH] * 2 + [
        len(data) - 2 * MAX_PLAINTEXT_LENGTH
    ]
    assert b"".join(received) == data


@pytest.mark.parametrize("at", [2, 9, -1])
async def test_a_message_that_was_changed_is_not_believed(at: int) -> None:
    pipe = Pipe()
    ours, theirs = sides(pipe)
    await theirs.write_msg(b"as it was sent")
    pipe.written[at] ^= 1
    with pytest.raises(InvalidTag):
        await ours.read_msg()


async def test_a_message_that_comes_twice_is_not_believed() -> None:
    pipe = Pipe()
    ours, theirs = sides(pipe)
    await theirs.write_msg(b"once")
    pipe.written *= 2
    assert await ours.read_msg() == b"once"
    with pytest.raises(InvalidTag):
        await ours.read_msg()


async def test_others_have_their_turn_while_many_messages_are_read() -> None:
    ours, theirs = sides(Pipe())
    for _ in range(1000):
        await theirs.write_msg(b"x")
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(1000):
            await ours.read_msg()
        nursery.cancel_scope.cancel()
    assert turns >= 2


def session_at(pipe: Pipe) -> tuple[NoiseSession, NoiseTransportReadWriter]:
    """A session of ours, and the other side of it."""
    ours, theirs = handshaken()
    connection = RawConnection(cast(Any, pipe), True)
    shaken = SecureSession(
        **cast(dict[str, Any], dict.fromkeys(("local_peer", "local_private_key", "remote_peer"))),
        remote_permanent_pubkey=cast(Any, None),
        is_initiator=True,
        conn=NoiseTransportReadWriter(connection, ours),
    )
    return NoiseSession(shaken), NoiseTransportReadWriter(connection, theirs)


async def test_a_session_takes_the_place_of_the_one_that_shook_hands() -> None:
    session, theirs = session_at(Pipe())
    assert session.is_initiator
    await session.write(b"waits")
    assert session.write_now(b"does not")
    assert [await theirs.read_msg() for _ in range(2)] == [b"waits", b"does not"]
    await theirs.write_msg(b"heard")
    assert await session.read() == b"heard"


async def test_what_cannot_go_at_once_uses_up_no_nonce() -> None:
    pipe = Pipe()
    session, theirs = session_at(pipe)
    assert not session.write_now(bytes(MAX_PLAINTEXT_LENGTH + 1))
    pipe.is_clear = False
    assert not session.stream.is_clear
    assert not session.write_now(b"never")
    await session.write(b"")
    assert not pipe.written
    await session.write(b"then")
    assert await theirs.read_msg() == b"then"
