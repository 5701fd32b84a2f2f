"""A libp2p host as p2pinfer uses it: streams to peers by id, handlers for protocols, and nothing else.

Everything that libp2p 0.8.1 gets wrong and that concerns hosts is put right here or in the modules below it:
only Noise and only our muxer are offered (the default host accepts plaintext), addresses are raced (libp2p
tries one, then refuses the peer for a minute), and nothing a peer sends can raise out of a handler (libp2p
would take the whole host down with it).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from multiaddr import Multiaddr

from p2pinfer.errors import AddressUnusable, PeerError, PeerUnreachable

from .addresses import advertised, check_listen, parse_tcp
from .dial import race
from .host_config import HostConfig
from .identity import Identity, is_peer_id
from .shield import shielded
from .stream import PeerStream
from .tcp import TunedTCP
from .yamux import YamuxConnection

__all__ = ["Host", "HostConfig", "open_host"]

logger = logging.getLogger(__name__)

Handler = Callable[[PeerStream], Awaitable[None]]


@asynccontextmanager
async def open_host(identity: Identity, config: HostConfig | None = None) -> AsyncGenerator[Host]:
    """A host that listens and dials until the block ends.

    Raises:
        AddressUnusable: An address of `config.listen` is malformed, taken, or not of this machine.
    """
    config = config or HostConfig()
    check_listen(config.listen)
    raw = _new_libp2p_host(identity, config)
    network: Any = raw.get_network()
    async with raw.run([Multiaddr(address) for address in config.listen]):
        try:
            for address in config.listen:
                if str(Multiaddr(address)) not in network.listeners:
                    raise AddressUnusable(f"cannot listen on {address}")
            yield Host(identity, config, raw)
        finally:
            with shielded(2):
                await _close(raw)


class Host:
    """This process as a peer among peers. Made by `open_host`."""

    def __init__(self, identity: Identity, config: HostConfig, libp2p_host: IHost) -> None:
        self.peer_id = identity.peer_id
        self.libp2p = libp2p_host
        self._config = config
        self._network: Any = libp2p_host.get_network()
        self._dials: dict[str, _Dial] = {}

    @property
    def addrs(self) -> tuple[str, ...]:
        """The multiaddrs that others can dial, each with `/p2p/<peer id>`; empty if this host only dials."""
        return tuple(str(address) for address in self.libp2p.get_addrs())

    def connected_peers(self) -> list[str]:
        """The peers there is a live connection to."""
        return [str(peer) for peer in self._network.connections if self._live_connections(str(peer))]

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"] | None:
        """How `peer_id` is connected; direct wins if it is both, None if it is neither."""
        connections = self._live_connections(peer_id)
        if not connections:
            return None
        kinds = {connection.get_connection_type() for connection in connections}
        return "relayed" if kinds == {ConnectionType.RELAYED} else "direct"

    async def open_stream(self, peer_id: str, protocol: str, addrs: Sequence[str] = ()) -> PeerStream:
        """A new stream to `peer_id` that speaks `protocol`; connects first if need be.

        Args:
            addrs: Multiaddrs to reach the peer at, best first, with or without `/p2p/<peer_id>`.

        Raises:
            PeerUnreachable: No address answered, or the peer does not speak `protocol`.
        """
        await self.connect(peer_id, addrs)
        try:
            with trio.fail_after(self._config.stream_timeout_s):
                stream = await self.libp2p.new_stream(ID.from_base58(peer_id), [TProtocol(protocol)])
        except trio.TooSlowError as exc:
            raise PeerUnreachable(
                f"peer {peer_id} did not open a stream within {self._config.stream_timeout_s:g} s", peer_id
            ) from exc
        except Exception as exc:  # libp2p raises anything from SwarmException to bare Exception here
            raise PeerUnreachable(
                f"peer {peer_id} does not open {protocol}: {_describe(exc)}", peer_id
            ) from exc
        return PeerStream(stream, peer_id)

    async def connect(self, peer_id: str, addrs: Sequence[str] = ()) -> None:
        """Make sure there is a live connection to `peer_id`. Callers at the same time share one dial.

        Raises:
            PeerUnreachable: No address answered with that identity.
        """
        if peer_id == self.peer_id:
            raise PeerUnreachable("this is our own peer id; a node does not dial itself", peer_id)
        if not is_peer_id(peer_id):
            raise PeerUnreachable(f"{peer_id!r} is not a peer id", peer_id)
        if self._live_connections(peer_id):
            return
        while (ongoing := self._dials.get(peer_id)) is not None:
            await ongoing.done.wait()
            if self._live_connections(peer_id):
                return
            if ongoing.error is not None and set(addrs) <= ongoing.addrs:
                raise PeerUnreachable(str(ongoing.error), peer_id) from ongoing.error
        dial = self._dials[peer_id] = _Dial(frozenset(addrs))
        try:
            await self._dial(peer_id, addrs)
        except PeerUnreachable as exc:
            dial.error = exc
            raise
        finally:
            del self._dials[peer_id]
            dial.done.set()

    def serve(self, protocol: str, handler: Handler) -> None:
        """Let `handler` answer every stream that a peer opens for `protocol`, in a task of its own.

        The stream is closed when the handler returns, and reset when it raises. A `PeerError` is the peer's
        own doing; any other exception is a bug of ours, and logged as such.
        """

        async def handle(raw_stream: Any) -> None:
            stream = PeerStream(raw_stream, str(raw_stream.muxed_conn.peer_id))
            try:
                await handler(stream)
            except PeerError as exc:
                logger.debug("stream.failed protocol=%s peer=%s why=%s", protocol, stream.peer_id, exc)
                await stream.reset()
            except Exception:
                logger.exception("the handler of %s failed", protocol)
                await stream.reset()
            except BaseException:
                await stream.reset()
                raise
            else:
                await stream.aclose()

        self.libp2p.set_stream_handler(TProtocol(protocol), handle)

    def _live_connections(self, peer_id: str) -> list[INetConn]:
        if not is_peer_id(peer_id):
            return []
        connections = self._network.connections.get(ID.from_base58(peer_id), [])
        return [connection for connection in connections if not connection.is_closed]

    async def _dial(self, peer_id: str, addrs: Sequence[str]) -> None:
        target = ID.from_base58(peer_id)

        async def attempt(address: str) -> None:
            protocol, host, port, named = parse_tcp(address)
            if named not in ("", peer_id):
                raise ValueError(f"it is an address of {named}")
            await self._network.dial_addr(Multiaddr(f"/{protocol}/{host}/tcp/{port}"), target)

        self._network.unblock_peer(target)
        errors: dict[str, Exception] = {}
        with trio.move_on_after(self._config.dial_timeout_s):
            errors = await race(list(dict.fromkeys(addrs)), attempt, self._config.dial_stagger_s)
        if self._live_connections(peer_id):
            return
        if not addrs:
            raise PeerUnreachable(f"no address of peer {peer_id} is known", peer_id)
        tried = ", ".join(
            f"{address} ({_describe(errors[address]) if address in errors else 'no answer'})"
            for address in addrs
        )
        raise PeerUnreachable(f"peer {peer_id} cannot be reached: tried {tried}", peer_id)


class _Dial:
    """A dial under way, and how it ended."""

    def __init__(self, addrs: frozenset[str]) -> None:
        self.addrs = addrs
        self.done = trio.Event()
        self.error: PeerUnreachable | None = None


def _new_libp2p_host(identity: Identity, config: HostConfig) -> IHost:
    noise = NoiseTransport(identity.key_pair, noise_privkey=create_noise_key_pair().private_key)
    host = new_host(
        key_pair=identity.key_pair,
        transports=[TunedTCP(config.user_timeout_s)],
        sec_opt={NOISE: noise},
        addrs_factory=_advertised,
        disable_identify_address_discovery=False,
        connection_config=ConnectionConfig(
            max_connections=config.max_connections,
            high_watermark=config.max_connections,
            min_connections=0,  # libp2p dials nobody of its own accord; bootstrap.py does
            low_watermark=0,
        ),
    )
    network = cast(Any, host.get_network())
    network.upgrader.muxer_multistream = _Muxer(config.max_streams_per_peer)
    network.retry_config = RetryConfig(max_retries=0)  # who dials decides when to try again
    network.set_stream_handler(_guarded(network.common_stream_handler))
    return host


class _Muxer(MuxerMultistream):
    """Negotiates yamux and speaks it our way. libp2p's makes its own `Yamux` whatever it is given."""

    def __init__(self, max_streams: int) -> None:
        super().__init__({TProtocol(YAMUX): YamuxConnection})
        self._max_streams = max_streams

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> YamuxConnection:
        await self.select_transport(cast(Any, conn))
        return YamuxConnection(conn, peer_id, max_streams=self._max_streams)


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


def _advertised(candidates: list[Multiaddr]) -> list[Multiaddr]:
    return [Multiaddr(address) for address in advertised(str(each) for each in candidates)]


async def _close(host: IHost) -> None:
    """Hang up on everybody at once; libp2p takes 0.1 s for each, one after the other."""
    network = cast(Any, host.get_network())
    async with trio.open_nursery() as nursery:
        for peer in list(network.connections):
            nursery.start_soon(network.close_peer, peer)
    await host.close()


def _describe(exc: BaseException) -> str:
    """The innermost reason, which libp2p wraps up to three times."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return str(exc) or type(exc).__name__
