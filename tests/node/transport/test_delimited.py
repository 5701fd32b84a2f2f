"""Messages behind a varint."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId

from p2pinfer.errors import PeerError, PeerVanished, ProtocolViolation
from p2pinfer.node.transport.delimited import receive_message, send_message


def receive(sent: bytes) -> tuple[HopMessage, bytes]:
    """The message that `sent` begins with, and what is left of it."""

    async def run() -> tuple[HopMessage, bytes]:
        ours, theirs = trio.testing.memory_stream_one_way_pair()
        await ours.send_all(sent)
        await ours.aclose()
        message = await receive_message(theirs, HopMessage)
        rest = b""
        while piece := await theirs.receive_some():
            rest += piece
        return message, rest

    return trio.run(run)


@given(st.binary(max_size=300), st.binary(max_size=10))
def test_a_message_arrives_as_it_was_and_what_follows_is_left(peer_id: bytes, rest: bytes) -> None:
    async def encode() -> bytes:
        ours, theirs = trio.testing.memory_stream_one_way_pair()
        await send_message(ours, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=peer_id)))
        return bytes(await theirs.receive_some())

    message, left = receive(trio.run(encode) + rest)
    assert (message.type, message.peer.id, left) == (HopMessage.CONNECT, peer_id, rest)


@given(st.binary(max_size=50))
def test_anything_else_is_the_peers_fault(sent: bytes) -> None:
    with suppress(PeerError):
        receive(sent)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"\x81\x20" + bytes(5000), ProtocolViolation),  # 4097 bytes
        (b"\xff\xff\xff\xff\x01", ProtocolViolation),
        (b"\x02\xff\xff", ProtocolViolation),
        (b"\x05\x08", PeerVanished),
        (b"", PeerVanished),
    ],
)
def test_what_is_too_long_malformed_or_cut_short(sent: bytes, error: type[PeerError]) -> None:
    with pytest.raises(error):
        receive(sent)
