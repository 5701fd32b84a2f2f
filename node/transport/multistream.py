"""Negotiation of a new stream's protocol in one round trip (multistream-select).

libp2p's client waits for the peer to confirm multistream itself before it asks for a protocol. Both lines can
go out at once, and those of other implementations do so too.
"""

from __future__ import annotations

from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from p2pinfer.errors import PeerRefused

from .yamux_stream import YamuxStream

MULTISTREAM = b"/multistream/1.0.0"
MAX_LINE_BYTES = 127  # so that its length is one byte


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
        raise PeerRefused(f"peer {peer_id} does not speak {protocol}", peer_id)


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
