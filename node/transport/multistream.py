"""Negotiation of a protocol in one round trip (multistream-select), for connections and streams.

libp2p's client waits for the peer to confirm multistream itself before it asks for a protocol. Both lines can
go out at once, and those of other implementations do so too. A dial has two negotiations, so it takes four
round trips instead of six: over two satellites, 6 s instead of 10.

Whoever speaks first on a stream need not wait for the agreement at all: what it says follows the proposal,
and the agreement is read before the first answer. That takes a round trip off each opening.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from operator import eq

import trio
from libp2p.abc import IMultiselectCommunicator
from libp2p.custom_types import TProtocol
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_client import DEFAULT_NEGOTIATE_TIMEOUT, MultiselectClient
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from p2pinfer.errors import PeerRefused

from .yamux_stream import YamuxStream

MULTISTREAM = b"/multistream/1.0.0"
MAX_LINE_BYTES = 127  # so that its length is one byte


class OneTripClient(MultiselectClient):
    """The dialling side where only one protocol is offered; several are tried as libp2p tries them."""

    async def select_one_of(
        self,
        protocols: Sequence[TProtocol],
        communicator: IMultiselectCommunicator,
        negotiate_timeout: int = DEFAULT_NEGOTIATE_TIMEOUT,
    ) -> TProtocol:
        """Raises MultiselectClientError: The peer does not speak the protocol, or was silent for too long."""
        if len(protocols) != 1:
            return await super().select_one_of(protocols, communicator, negotiate_timeout)
        said = list[str]()
        try:
            with trio.move_on_after(negotiate_timeout):
                await communicator.write(MULTISTREAM.decode())
                await communicator.write(protocols[0])
                said = [await communicator.read(), await communicator.read()]
        except MultiselectCommunicatorError as exc:
            raise MultiselectClientError(f"the negotiation of {protocols[0]} broke: {exc}") from exc
        if said != [MULTISTREAM.decode(), protocols[0]]:
            raise MultiselectClientError(f"the peer does not speak {protocols[0]}, or was silent: {said}")
        return protocols[0]


class Proposal:
    """A protocol that was proposed on a fresh stream, and what of the peer's agreement is still to come.

    Attributes:
        lines: What proposes it. A peer that agrees says the same.
    """

    def __init__(self, protocol: str, peer_id: str) -> None:
        self.lines = _line(MULTISTREAM) + _line(protocol.encode())
        self._awaited = self.lines
        self.protocol = protocol
        self._peer_id = peer_id

    async def read_agreement(self, stream: YamuxStream) -> None:
        """Read what the peer says to the proposal. If it was cancelled, another call goes on.

        Raises:
            PeerRefused: The peer does not know the protocol, or does not speak multistream.
            BaseLibp2pError: The stream broke.
        """
        while self._awaited:
            try:
                piece = await stream.read(len(self._awaited))
            except MuxedStreamEOF:
                piece = b""
            if not piece or not self._awaited.startswith(piece):
                raise self._refusal(piece)
            self._awaited = self._awaited[len(piece) :]

    def _refusal(self, piece: bytes) -> PeerRefused:
        agreed = len(self.lines) - len(self._awaited) + sum(takewhile(bool, map(eq, piece, self._awaited)))
        if agreed < len(_line(MULTISTREAM)):
            return PeerRefused(f"peer {self._peer_id} does not speak multistream", self._peer_id)
        why = f"peer {self._peer_id} does not speak {self.protocol}"
        return PeerRefused(why, self._peer_id, "not_spoken")


def _line(text: bytes) -> bytes:
    line = text + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a protocol id of {len(text)} bytes")
    return bytes([len(line)]) + line
