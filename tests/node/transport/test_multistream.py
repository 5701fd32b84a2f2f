"""Choosing a protocol on a new stream."""

from __future__ import annotations

from typing import cast

import pytest
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from p2pinfer.errors import PeerRefused
from p2pinfer.node.transport.multistream import negotiate
from p2pinfer.node.transport.yamux_stream import YamuxStream

MULTISTREAM = b"\x13/multistream/1.0.0\n"


class Script:
    """A stream on which the peer says `answer`, whatever it hears."""

    def __init__(self, answer: bytes, piece_bytes: int = 1) -> None:
        self.heard = b""
        self._answer = answer
        self._piece_bytes = piece_bytes

    async def write(self, data: bytes) -> None:
        self.heard += data

    async def read(self, n: int) -> bytes:
        if not self._answer:
            raise MuxedStreamEOF
        size = min(n, self._piece_bytes)
        taken, self._answer = self._answer[:size], self._answer[size:]
        return taken


async def run(script: Script, protocol: str = "/x/1") -> None:
    await negotiate(cast(YamuxStream, script), protocol, "peer")


async def test_both_lines_are_sent_at_once_and_nothing_is_read_beyond_the_answer() -> None:
    script = Script(MULTISTREAM + b"\x05/x/1\n" + b"more")
    await run(script)
    assert script.heard == MULTISTREAM + b"\x05/x/1\n"
    assert await script.read(10) == b"m"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (MULTISTREAM + b"\x03na\n", "does not speak /x/1"),
        (MULTISTREAM, "does not speak /x/1"),
        (b"", "multistream"),
        (b"\xff" * 300, "multistream"),
        (b"\x00", "multistream"),
        (b"\x13/multistream/2.0.0\n", "multistream"),
        (MULTISTREAM + b"\x06/x/10\n", "does not speak /x/1"),
    ],
)
async def test_any_other_answer_is_a_refusal(answer: bytes, why: str) -> None:
    with pytest.raises(PeerRefused, match=why) as caught:
        await run(Script(answer, piece_bytes=7))
    assert caught.value.peer_id == "peer"


async def test_a_protocol_id_that_cannot_be_sent_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="200 bytes"):
        await run(Script(b""), "x" * 200)
