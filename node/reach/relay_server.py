"""Relay server of circuit relay v2: carries connections between peers that cannot reach each other.

    private peer  --RESERVE-->  relay                       may be reached through the relay from now on
    other peer    --CONNECT-->  relay  --STOP CONNECT-->  private peer        bytes flow, end-to-end encrypted

Why not libp2p's own (0.8.1): it keeps circuits by peer, so the end of one closes another; it has one limit
for each thing and none per peer or in total; and it answers a reservation from a relay's own victim, such as
a peer that is itself relayed. What it gives are the messages, which are used here.

Everything a stranger can occupy is counted per peer, per address where peers are free to make, and in total.
Who exceeds his rate waits: his bytes stay in his own window, and nobody else's do.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, PeerId, Reservation, Status, StopMessage
from multiaddr import Multiaddr

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.circuit_stream import HOP_PROTOCOL
from p2pinfer.node.transport.delimited import receive_message, send_message
from p2pinfer.node.transport.identity import is_peer_id
from p2pinfer.node.transport.peer_stream import PeerStream

from .byte_rate import Throttle
from .circuit import STOP_PROTOCOL
from .relay_config import RelayConfig

logger = logging.getLogger(__name__)

HANDSHAKE_S: Final = 10.0  # for a peer's request, and for the target's answer
PIECE_BYTES: Final = 1 << 16  # carried at once
MAX_ADDRS: Final = 8  # of ours that a reservation names; a message has 4096 bytes


class Refused(Exception):
    """Refusal of what a peer asks, for the reason that the status says."""

    def __init__(self, status: Any) -> None:
        super().__init__(Status.Name(status))
        self.status = status


@dataclass(frozen=True, slots=True)
class RelayUse:
    """Use of a relay at the moment."""

    reservations: int
    circuits: int
    bytes_carried: int  # since the start


@dataclass(frozen=True, slots=True)
class _Reserved:
    ip: str
    expires_at: float


class Relay:
    """The relay of one host. `register` starts it."""

    def __init__(self, host: Host, config: RelayConfig, is_reachable: Callable[[PeerStream], bool]) -> None:
        """`is_reachable` says, of a peer's request, whether others than that peer can reach us."""
        self._host = host
        self._config = config
        self._is_reachable = is_reachable
        self._reserved: dict[str, _Reserved] = {}
        self._circuits = Counter[str]()  # by peer at either end
        self._total = 0
        self._bytes_carried = 0
        self._throttle = Throttle(config.bytes_per_s)
        self._throttles: dict[str, Throttle] = {}  # by peer that asked; only while it has circuits
        host.when_disconnected(self._forget)

    def register(self) -> None:
        """Answer requests from now on."""
        self._host.serve(HOP_PROTOCOL, self._answer)

    @property
    def use(self) -> RelayUse:
        """Use of this relay at the moment."""
        self._drop_expired()
        return RelayUse(len(self._reserved), self._total, self._bytes_carried)

    def serves(self, peer_id: str) -> bool:
        """True if others may reach this peer through us."""
        return peer_id in self._reserved

    async def _answer(self, stream: PeerStream) -> None:
        try:
            with trio.fail_after(HANDSHAKE_S):
                request = await receive_message(stream, HopMessage)
        except trio.TooSlowError as exc:
            raise ProtocolViolation("opened a stream to a relay and said nothing", stream.peer_id) from exc
        try:
            if stream.is_relayed:  # "over already relayed connections" -- circuit-v2, Hop Protocol
                raise Refused(Status.PERMISSION_DENIED)
            if request.type == HopMessage.RESERVE:
                await self._reserve(stream)
            elif request.type == HopMessage.CONNECT:
                await self._connect(stream, request)
            else:
                raise Refused(Status.UNEXPECTED_MESSAGE)
        except Refused as refusal:
            logger.debug("relay.refused peer=%s why=%s", stream.peer_id, refusal)
            with trio.move_on_after(HANDSHAKE_S):
                await send_message(stream, HopMessage(type=HopMessage.STATUS, status=refusal.status))

    # ------------------------------------------------------------------ reservations

    async def _reserve(self, stream: PeerStream) -> None:
        peer_id, config = stream.peer_id, self._config
        if self._host.gate.refuses(peer_id, "relaying"):
            raise Refused(Status.PERMISSION_DENIED)
        if not self._is_reachable(stream):
            raise Refused(Status.RESERVATION_REFUSED)
        self._drop_expired()
        ip = (stream.remote_address or ("", 0))[0]
        others = [each for name, each in self._reserved.items() if name != peer_id]
        if len(others) >= config.max_reservations:
            raise Refused(Status.RESOURCE_LIMIT_EXCEEDED)
        if sum(each.ip == ip for each in others) >= config.max_reservations_per_ip:
            raise Refused(Status.RESOURCE_LIMIT_EXCEEDED)
        self._reserved[peer_id] = _Reserved(ip, trio.current_time() + config.reservation_s)
        reservation = Reservation(
            expire=int(time.time() + config.reservation_s),
            addrs=[Multiaddr(address).to_bytes() for address in self._host.direct_addrs[:MAX_ADDRS]],
        )
        logger.debug("relay.reserved peer=%s reservations=%d", peer_id, len(self._reserved))
        await send_message(
            stream,
            HopMessage(
                type=HopMessage.STATUS, status=Status.OK, reservation=reservation, limit=self._limit()
            ),
        )

    def _forget(self, peer_id: str) -> None:
        """A reservation ends with its peer's connection."""
        self._reserved.pop(peer_id, None)

    def _drop_expired(self) -> None:
        now = trio.current_time()
        for peer_id in [name for name, each in self._reserved.items() if each.expires_at <= now]:
            del self._reserved[peer_id]

    # ------------------------------------------------------------------ circuits

    async def _connect(self, stream: PeerStream, request: HopMessage) -> None:
        source, target = stream.peer_id, str(ID(request.peer.id))
        self._drop_expired()
        if not is_peer_id(target):
            raise Refused(Status.MALFORMED_MESSAGE)
        if target == source or self._host.gate.refuses(source, "relaying"):
            raise Refused(Status.PERMISSION_DENIED)
        if target not in self._reserved:
            raise Refused(Status.NO_RESERVATION)
        with self._occupied(source, target):
            async with self._stop_stream(source, target) as there:
                await send_message(
                    stream, HopMessage(type=HopMessage.STATUS, status=Status.OK, limit=self._limit())
                )
                logger.debug("relay.circuit from=%s to=%s", source, target)
                await self._carry(stream, there)

    @contextmanager
    def _occupied(self, source: str, target: str) -> Generator[None]:
        """One of the places for circuits, as long as the block runs."""
        most = self._config.max_circuits_per_peer
        if self._total >= self._config.max_circuits:
            raise Refused(Status.RESOURCE_LIMIT_EXCEEDED)
        if self._circuits[source] >= most or self._circuits[target] >= most:
            raise Refused(Status.RESOURCE_LIMIT_EXCEEDED)
        self._total += 1
        self._circuits.update((source, target))
        try:
            yield
        finally:
            self._total -= 1
            self._circuits.subtract((source, target))
            self._circuits = +self._circuits  # drop those that are at 0
            if source not in self._circuits:
                self._throttles.pop(source, None)

    @asynccontextmanager
    async def _stop_stream(self, source: str, target: str) -> AsyncGenerator[PeerStream]:
        """A stream to `target`, which has agreed to be connected with `source`."""
        try:
            with trio.fail_after(HANDSHAKE_S):
                there = await self._host.open_stream(target, STOP_PROTOCOL, optimistic=True)
                peer = PeerId(id=ID.from_base58(source).to_bytes())
                try:
                    await send_message(
                        there, StopMessage(type=StopMessage.CONNECT, peer=peer, limit=self._limit())
                    )
                    answer = await receive_message(there, StopMessage)
                except BaseException:
                    await there.reset()
                    raise
        except (PeerError, trio.TooSlowError) as exc:
            logger.debug("relay.target_failed from=%s to=%s why=%s", source, target, exc)
            raise Refused(Status.CONNECTION_FAILED) from exc
        async with aclosing(there):
            if answer.type != StopMessage.STATUS or answer.status != Status.OK:
                raise Refused(Status.CONNECTION_FAILED)
            yield there

    async def _carry(self, one: PeerStream, other: PeerStream) -> None:
        """Carry bytes both ways until either side ends, or a limit does."""
        throttle = self._throttles.setdefault(one.peer_id, Throttle(self._config.bytes_per_s_per_peer))
        left = self._config.max_circuit_bytes

        async def carry(source: PeerStream, sink: PeerStream) -> None:
            nonlocal left
            while piece := await source.receive_some(PIECE_BYTES):
                left -= len(piece)
                if left < 0:
                    logger.debug("relay.spent from=%s to=%s", one.peer_id, other.peer_id)
                    break
                now = trio.current_time()
                delay_s = max(each.delay_s(len(piece), now) for each in (throttle, self._throttle))
                if delay_s:
                    await trio.sleep(delay_s)
                await sink.send_all(piece)
                self._bytes_carried += len(piece)
            nursery.cancel_scope.cancel()

        with trio.move_on_after(self._config.max_circuit_s):
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(carry, one, other)
                    nursery.start_soon(carry, other, one)
            except* PeerError as gone:
                why = gone.exceptions[0]
                logger.debug("relay.lost from=%s to=%s why=%s", one.peer_id, other.peer_id, why)

    def _limit(self) -> Limit:
        return Limit(duration=int(self._config.max_circuit_s), data=self._config.max_circuit_bytes)
