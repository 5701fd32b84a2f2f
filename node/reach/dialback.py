"""Dial-back: a peer tells which address it sees us at, and tries to connect to us there.

Request and response are each one MessagePack value behind a big-endian u32 length; see docs/wire.md. Whoever
is asked dials only the address that the question comes from, so nobody can be made to dial somebody else. It
proves our identity by a Noise handshake and hangs up, so no connection is left that could count as one.
"""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import Annotated, Any, Final

import msgspec
import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.concurrency.shield import shielded
from p2pinfer.node.host.host import Host
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.transport.line_rate import MAX_RTT_S
from p2pinfer.node.transport.peer_stream import PeerStream

from .reachability import Observation

logger = logging.getLogger(__name__)

DIALBACK_PROTOCOL: Final = "/p2pinfer/dialback/1.0.0"
MAX_PORTS: Final = 4
DIAL_S: Final = 2.0  # for one dial back; a dropped SYN is sent again after one second
ANSWER_S: Final = 4.0  # for the whole of an answer
ROUND_TRIPS: Final = 8  # that a dial may take beside that: who is far away is no less reachable
MAX_BYTES: Final = 1024
ASKS_PER_S: Final = 0.2  # of one IP address; each costs us a few packets and a handshake
ASKS_AT_ONCE: Final = 8
MAX_UNDER_WAY: Final = 32

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class _Ports(msgspec.Struct, frozen=True, array_like=True):
    ports: Annotated[tuple[_Port, ...], msgspec.Meta(max_length=MAX_PORTS)]  # where to try


class _Seen(msgspec.Struct, frozen=True, array_like=True):
    ip: Annotated[str, msgspec.Meta(max_length=64)]  # the connection comes from there
    port: _Port
    reached: Annotated[tuple[_Port, ...], msgspec.Meta(max_length=MAX_PORTS)]


_encoder: Final = msgspec.msgpack.Encoder()
_questions: Final[msgspec.msgpack.Decoder[_Ports]] = msgspec.msgpack.Decoder(_Ports)
_answers: Final[msgspec.msgpack.Decoder[_Seen]] = msgspec.msgpack.Decoder(_Seen)


def serve_dialback(host: Host) -> None:
    """Answer whoever asks from now on."""
    asked = RateLimit(ASKS_PER_S, ASKS_AT_ONCE)
    under_way = trio.CapacityLimiter(MAX_UNDER_WAY)

    async def answer(stream: PeerStream) -> None:
        far_s = ROUND_TRIPS * min(stream.line.rtt_s, MAX_RTT_S)
        with trio.move_on_after(ANSWER_S + 2 * far_s):
            request = decode_request(await receive_value(stream, MAX_BYTES))
            remote = stream.remote_address
            if remote is None:
                raise ProtocolViolation("asked through a relay to be dialled back", stream.peer_id)
            reached: list[int] = []
            if asked.take(remote[0], trio.current_time()):
                async with under_way, trio.open_nursery() as nursery:
                    for port in dict.fromkeys(request.ports):
                        nursery.start_soon(
                            _try, host, stream.peer_id, remote[0], port, reached, DIAL_S + far_s
                        )
            await send_value(stream, _encoder.encode(_Seen(*remote, tuple(reached))))

    host.serve(DIALBACK_PROTOCOL, answer)


async def ask(host: Host, peer_id: str, ports: tuple[int, ...]) -> Observation:
    """Ask a directly connected peer what it sees of us.

    Args:
        ports: Where it should try to reach us; at most `MAX_PORTS` count.

    Raises:
        PeerError: The peer is gone, does not speak this, or answers nonsense.
    """
    try:
        with host.within(ANSWER_S + DIAL_S, [peer_id], 3 * ROUND_TRIPS) as patience:
            async with aclosing(await host.open_stream(peer_id, DIALBACK_PROTOCOL)) as stream:
                if stream.is_relayed:
                    raise PeerVanished("there is no direct connection", peer_id)
                local_port = None if stream.is_inbound else stream.local_port
                await send_value(stream, _encoder.encode(_Ports(ports[:MAX_PORTS])))
                answer = decode_response(await receive_value(stream, MAX_BYTES))
        if patience.cancelled_caught:
            raise PeerVanished("no answer to where it sees us", peer_id)
    except ProtocolViolation as exc:
        exc.peer_id = peer_id
        raise
    reached = tuple(port for port in answer.reached if port in ports)
    return Observation(peer_id, answer.ip, answer.port, local_port, reached)


def decode_request(encoded: bytes) -> _Ports:
    """Raises ProtocolViolation for anything that is no request."""
    request: _Ports = _decode(_questions, encoded)
    return request


def decode_response(encoded: bytes) -> _Seen:
    """Raises ProtocolViolation for anything that is no response."""
    response: _Seen = _decode(_answers, encoded)
    return response


def _decode(decoder: Any, encoded: bytes) -> Any:
    try:
        return decoder.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("malformed dial-back message") from exc


async def _try(host: Host, peer_id: str, ip: str, port: int, reached: list[int], within_s: float) -> None:
    """Note `port` if `peer_id` itself answers there in time."""
    network: Any = host.libp2p.get_network()
    address = Multiaddr(f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}")
    with trio.move_on_after(within_s):
        raw = None
        try:
            raw = await network.transport_manager.transport_for_dialing(address).dial(address)
            await network.upgrader.upgrade_security(raw, True, ID.from_base58(peer_id))
            reached.append(port)
        except Exception as exc:  # a stranger's handshake can go wrong in any way
            logger.debug("dialback.failed peer=%s address=%s why=%r", peer_id, address, exc)
        finally:
            if raw is not None:
                with shielded(1):
                    await raw.close()
