"""Subclass of libp2p's host that corrects faults of version 0.8.1.

Only Noise is offered (the default host accepts plaintext), nobody is dialled unasked, nothing that a peer
sends can raise out of a handler (libp2p would take the whole host down with it), and closing takes a tenth
of a second however many are connected.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import trio
from libp2p import new_host
from libp2p.abc import IHost, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from multiaddr import Multiaddr

from p2pinfer.node.concurrency.loop_share import clocked
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.concurrency.shield import shielded
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.transport.addresses import advertised, range_of_connection
from p2pinfer.node.transport.connection_gate import GATED, Gate
from p2pinfer.node.transport.counters import Counts
from p2pinfer.node.transport.identity import Identity
from p2pinfer.node.transport.multistream import OneTripClient
from p2pinfer.node.transport.noise import NoiseHandshake, NoiseSession
from p2pinfer.node.transport.swarm_key import load_swarm_key
from p2pinfer.node.transport.tcp import TunedTCP
from p2pinfer.node.transport.yamux import YamuxConnection
from p2pinfer.node.transport.yamux_frames import GO_AWAY, HEADER

logger = logging.getLogger(__name__)

HANDSHAKE_SPAN = 4  # a whole handshake may take so many times the limit for a peer's first word
_STALE_S = 3.0  # a connection that is silent for so much longer than another of the peer's is not used
ADDRESSES_LAST_S = 2.0  # before the interfaces are looked at again: a laptop may have moved


def new_libp2p_host(identity: Identity, config: HostConfig, gate: Gate, counts: Counts) -> IHost:
    """A host that offers Noise and our muxer, dials nobody of its own accord, and outlives its handlers.

    Raises:
        ConfigError: `config.swarm_key` is no key.
    """
    key = load_swarm_key(config.swarm_key) if config.swarm_key else None
    strangers = _Strangers(counts)
    host = new_host(
        key_pair=identity.key_pair,
        transports=[
            TunedTCP(
                config.user_timeout_s,
                key,
                strangers,
                config.max_connections_per_address,
                gate.loop_shares,
                first_word_s=config.handshake_timeout_s,
            )
        ],
        sec_opt={NOISE: NoiseHandshake(identity.key_pair, strangers)},
        addrs_factory=_Advertised(),
        connection_config=ConnectionConfig(
            max_connections=config.max_connections,
            high_watermark=config.max_connections,
            max_connections_per_peer=config.max_connections_per_peer,
            min_connections=0,
            low_watermark=0,
            grace_period=0.0,  # else a peer that dials and dials has any number of connections for 20 s
            # Five round trips, and nothing is measured yet; who says nothing at all is dropped before.
            # Whoever dials has a limit of its own, which follows the round trip (`RoundTrips`).
            inbound_upgrade_timeout=HANDSHAKE_SPAN * config.handshake_timeout_s,
            outbound_upgrade_timeout=HANDSHAKE_SPAN * config.handshake_timeout_s,
            inbound_stream_protocol_negotiation_timeout=config.handshake_timeout_s,
        ),
    )
    network: Any = host.get_network()
    network.set_resource_manager(
        None
    )  # its limits, 256 who come in among them, are not ours, and make no sound
    network.upgrader.security_multistream._selector.multiselect_client = OneTripClient()
    network.upgrader.muxer_multistream = _Muxer(config.max_streams_per_peer, gate, counts)
    network.auto_connector = _DialsNobody(network)
    network.retry_config = RetryConfig(max_retries=0)  # who dials decides when to try again
    network.set_stream_handler(_guarded(network.common_stream_handler))
    network._notify = _without_streams(network._notify)
    return host


async def run_libp2p_host(
    host: IHost, listen: Sequence[Multiaddr], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run a host made by `new_libp2p_host` until cancelled."""
    async with host.run(listen):
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            with shielded(2):
                await _close(host)


def _without_streams(notify: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Tell notifees of connections alone.

    None of them, libp2p's own included, does anything when a stream opens or closes; but to be told so, each
    has a task of its own, in a nursery, at both ends of the stream. Where hundreds of streams end at once,
    this was a third of what ending them took.
    """

    async def tell(event: str, *args: Any) -> None:
        if event not in ("opened_stream", "closed_stream"):
            await notify(event, *args)

    return tell


def raw_stream_of(connection: Any) -> Any:
    """The `RawStream` under a connection of the swarm: below yamux, Noise and libp2p's wrappers."""
    return connection.muxed_conn.secured_conn.raw


def freshest(connections: Sequence[Any]) -> Any:
    """The oldest, unless nothing comes on it any more: the peer's address has changed, say. None of none."""
    heard_at = max((each.muxed_conn.heard_at for each in connections), default=0.0) - _STALE_S
    return next((each for each in connections if each.muxed_conn.heard_at >= heard_at), None)


class _Muxer(MuxerMultistream):
    """Negotiates yamux and speaks it our way. libp2p's makes its own `Yamux` whatever it is given."""

    def __init__(self, max_streams: int, gate: Gate, counts: Counts) -> None:
        super().__init__({TProtocol(YAMUX): YamuxConnection})
        self._selector.multiselect_client = OneTripClient()
        self._max_streams = max_streams
        self._gate = gate
        self._counts = counts

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> YamuxConnection:
        """Raises MultiselectError for a peer that we do not let in, after telling it so."""
        conn = NoiseSession(cast(SecureSession, conn))
        await self.select_transport(cast(Any, conn))
        if not self._gate.lets_in(str(peer_id)):
            await conn.write(HEADER.pack(0, GO_AWAY, 0, 0, GATED))
            raise MultiselectError(f"peer {peer_id} is not let in")
        relayed = conn.get_connection_type() == ConnectionType.RELAYED
        traffic = self._counts.traffic["relayed" if relayed else "direct"]
        address_range = range_of_connection(conn.get_remote_address(), conn.get_transport_addresses())
        conn.meter = self._gate.loop_shares.meter(str(peer_id), address_range)
        conn.raw.expected_rtt_s = conn.raw.rtt_s or conn.handshake_s
        return MeteredConnection(
            conn, peer_id, max_streams=self._max_streams, gate=self._gate, traffic=traffic
        )


class MeteredConnection(YamuxConnection):
    """A connection whose peer waits while its messages take more than its part of the event loop.

    The wait comes before a message is read (`NoiseSession.read`), so that it slows this peer alone.
    """

    def __init__(self, conn: NoiseSession, peer_id: ID, **options: Any) -> None:
        super().__init__(conn, peer_id, **options)
        self.meter = conn.meter

    async def start(self) -> None:
        """Run the connection until it ends; the task that does also reads."""
        await clocked(super().start(), self.meter.spend)


class _Strangers:
    """Tells of whoever connects and cannot be of our swarm, once a minute for one address."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._told = RateLimit(1 / 60, 1)

    def __call__(self, address: str, why: str) -> None:
        self._counts.add("refusals", "stranger")
        if self._told.take(address, time.monotonic()):
            logger.warning("rejected a connection from %s: %s", address, why)


class _DialsNobody(AutoConnector):
    """libp2p would dial whomever it has heard of until half of `max_connections` is reached."""

    async def maybe_connect(self) -> None:
        await trio.lowlevel.checkpoint()


class _Advertised:
    """Turns what a host listens on into what it tells others.

    libp2p asks with every message of gossip, and looking at the interfaces takes a millisecond.
    """

    def __init__(self) -> None:
        self._asked: list[Multiaddr] = []
        self._answer: list[Multiaddr] = []
        self._asked_at = -ADDRESSES_LAST_S

    def __call__(self, listening: Sequence[Multiaddr]) -> list[Multiaddr]:
        now = time.monotonic()
        if self._asked != list(listening) or now - self._asked_at > ADDRESSES_LAST_S:
            self._asked, self._asked_at = list(listening), now
            self._answer = [Multiaddr(address) for address in advertised(str(each) for each in listening)]
        return list(self._answer)


def _guarded(handle: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """libp2p's own handler of incoming streams, such that no peer can make it raise.

    It negotiates the protocol and calls the protocol's handler in a task of the connection's nursery, which
    hangs below the host's: an exception, such as UnicodeDecodeError for a protocol name that is not UTF-8,
    would end the host.
    """

    async def guarded(stream: Any) -> None:
        try:
            await handle(stream)
        except Exception as exc:
            logger.debug("stream.failed peer=%s why=%r", stream.muxed_conn.peer_id, exc)
            await stream.reset()

    return guarded


async def _close(host: IHost) -> None:
    """Hang up on everybody at once; libp2p takes 0.1 s for each, one after the other."""
    network: Any = host.get_network()
    async with trio.open_nursery() as nursery:
        for peer in list(network.connections):
            nursery.start_soon(network.close_peer, peer)
    await host.close()
