"""Stream through a relay to another peer: circuit relay v2, on the dialling side.

It is upgraded like a socket, with Noise and yamux of its own, so the relay sees ciphertext and `Host` sees a
connection like any other.
"""

from __future__ import annotations

from typing import Any, Final

import trio
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status
from multiaddr import Multiaddr

from p2pinfer.errors import PeerRefused, PeerVanished, ProtocolViolation

from .delimited import receive_message, send_message
from .peer_stream import PeerStream
from .raw_stream import RawStream
from .tcp import on_round_trip

HOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/hop"
HANDSHAKE_S: Final = 10.0  # for the relay's answer, and for the other peer's first message
READ_BYTES: Final = 1 << 17
SEND_BYTES: Final = 1 << 16
WAITED_S: Final = 0.02  # a write that took longer had to wait for the line, and not for other tasks


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
        before, began_at = muxed.bytes_sent, trio.current_time()
        try:
            await muxed.write(bytes(outbox[:SEND_BYTES]))
        except BaseLibp2pError as exc:
            self.closed.set()
            raise ConnectionClosedError(f"the circuit broke: {exc}", transport="circuit") from exc
        finally:  # what a cancelled write has counted as sent is on its way
            sent, taken_at = muxed.bytes_sent - before, trio.current_time()
            del outbox[:sent]
            self.rate.note(sent, began_at, taken_at if taken_at - began_at > WAITED_S else began_at)

    @property
    def queued_bytes(self) -> int:
        return len(self._outbox) + self._stream.line.queued_bytes

    def _send_now(self, outbox: bytearray) -> None:
        if self._stream.muxed.write_now(bytes(outbox)):
            outbox.clear()

    async def close(self) -> None:
        self.closed.set()
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: the socket's would be the relay's."""
        return None


async def dial_circuit(network: Any, stream: PeerStream, relay_addr: str, peer_id: str) -> None:
    """Connect to `peer_id` through a relay; the connection is the network's when this returns.

    Args:
        network: libp2p's, of which its types leave parts out.
        stream: To the relay, for `HOP_PROTOCOL`; taken over.
        relay_addr: Where the relay was dialled, without `/p2p-circuit`.

    Raises:
        PeerError: The relay refuses, or the peer does not answer through it.
        BaseLibp2pError: The peer at the other end is not `peer_id`, or the circuit broke.
    """
    relay_id = stream.peer_id
    try:
        with trio.fail_after(HANDSHAKE_S):
            target = PeerId(id=ID.from_base58(peer_id).to_bytes())
            asked_at = trio.current_time()
            await send_message(stream, HopMessage(type=HopMessage.CONNECT, peer=target))
            check_status(await receive_message(stream, HopMessage), relay_id)
        if (heard := on_round_trip.get()) is not None:
            heard(trio.current_time() - asked_at)
        raw = circuit_connection(stream, initiator=True, address=f"{relay_addr}/p2p-circuit")
        await network.upgrade_outbound_raw_conn(raw, ID.from_base58(peer_id))
    except trio.TooSlowError as exc:
        await stream.reset()
        raise PeerVanished(f"relay {relay_id} does not answer", relay_id) from exc
    except BaseException:
        await stream.reset()
        raise


def circuit_connection(stream: PeerStream, *, initiator: bool, address: str) -> Any:
    """A pipe as libp2p wants it before the upgrade."""
    return RawConnection(CircuitStream(stream), initiator, ConnectionType.RELAYED, [Multiaddr(address)])


def check_status(answer: HopMessage, relay_id: str) -> None:
    """Nothing, if a relay's answer is that all is well.

    Raises:
        PeerRefused: It says why it is not.
        ProtocolViolation: It is no status.
    """
    if answer.type != HopMessage.STATUS:
        raise ProtocolViolation("a relay answers with something that is no status", relay_id)
    if answer.status != Status.OK:
        name = Status.Name(answer.status) if answer.status in Status.values() else str(answer.status)
        raise PeerRefused(f"relay {relay_id} refuses: {name.lower().replace('_', ' ')}", relay_id)
