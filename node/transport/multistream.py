"""Negotiation of a protocol in one round trip (multistream-select), for connections and streams.

libp2p's client waits for the peer to confirm multistream itself before it asks for a protocol. Both lines can
go out at once, and those of other implementations do so too. A dial has two negotiations, so it takes four
round trips instead of six: over two satellites, 6 s instead of 10.
"""

from __future__ import annotations

from collections.abc import Sequence

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


async def negotiate(stream: YamuxStream, protocol: str, peer_id: str) -> None:
    """Have the peer at the other end of a fresh `stream` speak `protocol` on it.

    Raises:
        PeerRefused: The peer does not know the protocol, or does not speak multistream.
        BaseLibp2pError: The stream broke.
    """
    await stream.write(_line(MULTISTREAM) + _line(protocol.encode()))
    if await _read_line(stream) != MULTISTREAM:
        raise PeerRefused(f"peer {peer_id} does not speak multistream", peer_id)
    if await _read_line(stream) != protocol.encode():
        raise PeerRefused(f"peer {peer_id} does not speak {protocol}", peer_id, "not_spoken")


def _line(text: bytes) -> bytes:
    line = text + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a protocol id of {len(text)} bytes")
    return bytes([len(line)]) + line


async def _read_line(stream: YamuxStream) -> bytes:
    """The next line without its end, or as much of it as came."""
    try:
        size = (await stream.read(1))[0]
        line = b""
        while len(line) < min(size, MAX_LINE_BYTES):
            line += await stream.read(size - len(line))
    except MuxedStreamEOF:
        return b""
    return line.removesuffix(b"\n")
