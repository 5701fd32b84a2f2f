"""Choosing a protocol on a new stream."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from p2pinfer.errors import PeerRefused
from p2pinfer.node.transport.multistream import OneTripClient, Proposal
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
    proposal = Proposal(protocol, "peer")
    await script.write(proposal.lines)
    await proposal.read_agreement(cast(YamuxStream, script))


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


async def test_an_agreement_whose_reading_was_cancelled_is_read_on() -> None:
    class Slow(Script):
        async def read(self, n: int) -> bytes:
            if len(self._answer) == 9:
                await trio.sleep_forever()
            return await super().read(n)

    script, proposal = Slow(MULTISTREAM + b"\x05/x/1\n" + b"abcd"), Proposal("/x/1", "peer")
    with trio.CancelScope() as scope:
        scope.cancel()
        await proposal.read_agreement(cast(YamuxStream, script))
    assert scope.cancelled_caught
    rest = Script(b"\x05/x/1\n"[1:] + b"abcd")
    await proposal.read_agreement(cast(YamuxStream, rest))
    assert await rest.read(4) == b"a"


async def test_a_protocol_id_that_cannot_be_sent_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="200 bytes"):
        await run(Script(b""), "x" * 200)


class Wire:
    """A connection whose peer says `answer` once it has heard so many lines."""

    def __init__(self, answer: bytes, after_lines: int) -> None:
        self.heard = b""
        self._answer = answer
        self._after_lines = after_lines

    async def write(self, data: bytes) -> None:
        self.heard += data

    async def read(self, n: int | None = None) -> bytes:
        assert self.heard.count(b"\n") >= self._after_lines, "it waits for the peer before it has said all"
        taken, self._answer = self._answer[:n], self._answer[n or len(self._answer) :]
        return taken


async def test_a_connection_asks_for_its_only_protocol_without_waiting() -> None:
    wire = Wire(MULTISTREAM + b"\x07/noise\n", after_lines=2)
    communicator = MultiselectCommunicator(cast(Any, wire))
    assert await OneTripClient().select_one_of([TProtocol("/noise")], communicator) == "/noise"
    assert wire.heard == MULTISTREAM + b"\x07/noise\n"


async def test_several_protocols_are_tried_one_after_the_other() -> None:
    wire = Wire(MULTISTREAM + b"\x03na\n" + b"\x03/b\n", after_lines=1)
    communicator = MultiselectCommunicator(cast(Any, wire))
    assert await OneTripClient().select_one_of([TProtocol("/a"), TProtocol("/b")], communicator) == "/b"


@pytest.mark.parametrize(
    "answer", [MULTISTREAM + b"\x03na\n", b"\x13/multistream/2.0.0\n\x07/noise\n", b"", b"\xff" * 99]
)
async def test_a_peer_that_does_not_agree_is_not_spoken_to(answer: bytes) -> None:
    communicator = MultiselectCommunicator(cast(Any, Wire(answer, after_lines=2)))
    with pytest.raises(MultiselectClientError, match="/noise"):
        await OneTripClient().select_one_of([TProtocol("/noise")], communicator)
