"""Client side of circuit relay v2: reservations, and connections that come through relays."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from multiaddr import Multiaddr

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.circuit_stream import HANDSHAKE_S, HOP_PROTOCOL, check_status, circuit_connection
from p2pinfer.node.transport.delimited import receive_message, send_message
from p2pinfer.node.transport.identity import is_peer_id
from p2pinfer.node.transport.peer_stream import PeerStream

STOP_PROTOCOL: Final = "/libp2p/circuit/relay/0.2.0/stop"


@dataclass(frozen=True, slots=True)
class Granted:
    """Reservation that a relay granted us, for `expires_s` from now by its own clock."""

    relay_id: str
    expires_s: float


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
    check_status(answer, relay_id)
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
                raise ProtocolViolation("a relay sent an invalid connection request", stream.peer_id)
            await send_message(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
        network: Any = host.libp2p.get_network()
        address = f"/p2p/{stream.peer_id}/p2p-circuit"
        raw = circuit_connection(stream, initiator=False, address=address)
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
            raise PeerVanished(f"relay {stream.peer_id} sent no request", stream.peer_id) from exc

    host.serve(STOP_PROTOCOL, guarded)
