"""Connections through a relay, at either end of them: circuit relay v2 for who cannot be reached directly.

A circuit is a stream to the relay that has become a pipe to the other peer. It is upgraded like a socket,
with Noise and yamux of its own, so the relay sees ciphertext and `Host` sees a connection like any other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage
from multiaddr import Multiaddr

from p2pinfer.errors import PeerRefused, PeerVanished, ProtocolViolation

from .delimited import receive_message, send_message
from .identity import is_peer_id
from .raw_stream import RawStream
from .stream import PeerStream

if TYPE_CHECKING:
    from .host import Host

logger = logging.getLogger(__name__)

HOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/hop"
STOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/stop"
HANDSHAKE_S: Final = 10.0  # for the relay's answer, and for the other peer's first message
READ_BYTES: Final = 1 << 17
SEND_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Granted:
    """What a relay granted us: to be reached through it, for `expires_s` from now by its own clock."""

    relay_id: str
    expires_s: float


class CircuitStream(RawStream):
    """A stream to a relay as the pipe that it has become."""

    def __init__(self, stream: PeerStream) -> None:
        super().__init__()
        self._stream = stream

    async def _receive(self) -> bytes:
        try:
            received = bytes(await self._stream.receive_some(READ_BYTES))
        except (PeerVanished, trio.ClosedResourceError) as exc:
            raise ConnectionClosedError(f"the circuit broke: {exc}", transport="circuit") from exc
        if not received:
            raise ConnectionClosedError("the circuit has ended", transport="circuit")
        return received

    async def _send_some(self, outbox: bytearray) -> None:
        muxed = self._stream.muxed
        before = muxed.bytes_sent
        try:
            await muxed.write(bytes(outbox[:SEND_BYTES]))
        except BaseLibp2pError as exc:
            self.closed.set()
            raise ConnectionClosedError(f"the circuit broke: {exc}", transport="circuit") from exc
        finally:  # what a cancelled write has counted as sent is on its way
            del outbox[: muxed.bytes_sent - before]

    async def close(self) -> None:
        self.closed.set()
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: the socket's would be the relay's."""
        return None


async def dial_circuit(host: Host, relay_id: str, relay_addr: str, peer_id: str) -> None:
    """Connect to `peer_id` through a relay; the connection is the host's when this returns.

    Args:
        relay_addr: Where the relay can be dialled, without `/p2p-circuit`.

    Raises:
        PeerError: The relay cannot be reached, refuses, or the peer does not answer through it.
        BaseLibp2pError: The peer at the other end is not `peer_id`, or the circuit broke.
    """
    stream = await host.open_stream(relay_id, HOP_PROTOCOL, [relay_addr])
    try:
        with trio.fail_after(HANDSHAKE_S):
            target = PeerId(id=ID.from_base58(peer_id).to_bytes())
            await send_message(stream, HopMessage(type=HopMessage.CONNECT, peer=target))
            _check(await receive_message(stream, HopMessage), relay_id)
        network: Any = host.libp2p.get_network()
        raw = _connection(stream, initiator=True, address=f"{relay_addr}/p2p-circuit")
        await network.upgrade_outbound_raw_conn(raw, ID.from_base58(peer_id))
    except trio.TooSlowError as exc:
        await stream.reset()
        raise PeerVanished(f"relay {relay_id} does not answer", relay_id) from exc
    except BaseException:
        await stream.reset()
        raise


async def reserve(host: Host, relay_id: str) -> Granted:
    """Ask a connected relay to let others reach us through it, or to do so for longer.

    Raises:
        PeerRefused: It does not relay, or has no room for us.
        PeerError: It is gone, or breaks the protocol.
    """
    async with aclosing(await host.open_stream(relay_id, HOP_PROTOCOL)) as stream:
        try:
            with trio.fail_after(HANDSHAKE_S):
                await send_message(stream, HopMessage(type=HopMessage.RESERVE))
                answer = await receive_message(stream, HopMessage)
        except trio.TooSlowError as exc:
            raise PeerVanished(f"relay {relay_id} does not answer", relay_id) from exc
    _check(answer, relay_id)
    return Granted(relay_id, answer.reservation.expire - time.time())


def serve_circuits(host: Host, on_arrival: Callable[[str], Awaitable[None]]) -> None:
    """Let relays connect others with us from now on.

    Args:
        on_arrival: Called, as a task of the circuit, with the id of every peer that arrives. It is cancelled
            when the circuit ends.
    """

    async def answer(stream: PeerStream) -> None:
        with trio.fail_after(HANDSHAKE_S):
            request = await receive_message(stream, StopMessage)
            source = str(ID(request.peer.id))
            if request.type != StopMessage.CONNECT or not is_peer_id(source) or stream.is_relayed:
                malformed = StopMessage(type=StopMessage.STATUS, status=Status.MALFORMED_MESSAGE)
                await send_message(stream, malformed)
                raise ProtocolViolation("a relay asked for something that is no connection", stream.peer_id)
            await send_message(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
        network: Any = host.libp2p.get_network()
        address = f"/p2p/{stream.peer_id}/p2p-circuit"
        raw = _connection(stream, initiator=False, address=address)
        try:
            muxed = await network.upgrade_inbound_raw_conn(raw, Multiaddr(address))
        except BaseLibp2pError as exc:
            raise PeerVanished(f"no connection came through relay {stream.peer_id}: {exc}", source) from exc
        async with trio.open_nursery() as nursery:
            nursery.start_soon(on_arrival, str(muxed.peer_id))
            await raw.stream.closed.wait()
            nursery.cancel_scope.cancel()

    async def guarded(stream: PeerStream) -> None:
        try:
            await answer(stream)
        except trio.TooSlowError as exc:
            raise PeerVanished(f"relay {stream.peer_id} says nothing", stream.peer_id) from exc

    host.serve(STOP_PROTOCOL, guarded)


def _connection(stream: PeerStream, *, initiator: bool, address: str) -> Any:
    return RawConnection(CircuitStream(stream), initiator, ConnectionType.RELAYED, [Multiaddr(address)])


def _check(answer: HopMessage, relay_id: str) -> None:
    if answer.type != HopMessage.STATUS:
        raise ProtocolViolation("a relay answers with something that is no status", relay_id)
    if answer.status != Status.OK:
        name = Status.Name(answer.status) if answer.status in Status.values() else str(answer.status)
        raise PeerRefused(f"relay {relay_id} refuses: {name.lower().replace('_', ' ')}", relay_id)
