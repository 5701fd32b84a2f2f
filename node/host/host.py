"""Host of p2pinfer: streams to peers by id and handlers for protocols, over libp2p.

All addresses of a peer are raced; libp2p tries one of them, and then refuses the peer for a minute.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, cast

import trio
from libp2p.abc import IHost
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from p2pinfer.errors import AddressUnusable, NotAdmitted, NotDialled, PeerUnreachable
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.concurrency.shield import shielded
from p2pinfer.node.host_config import HostConfig as HostConfig
from p2pinfer.node.transport.addresses import (
    CIRCUIT,
    check_announced,
    check_listen,
    is_circuit,
    parse_circuit,
    parse_tcp,
    without_missing_ipv6,
)
from p2pinfer.node.transport.circuit_stream import HOP_PROTOCOL, dial_circuit
from p2pinfer.node.transport.connection_gate import GATED, Gate, reason
from p2pinfer.node.transport.counters import Counts
from p2pinfer.node.transport.identity import Identity, is_peer_id, libp2p_id, verify
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.node.transport.tcp import on_round_trip
from p2pinfer.routing.announcement import MAX_ADDRS

from .address_race import race
from .dial import Dial, check_named
from .dial_failure import dial_failure
from .libp2p_host import freshest, new_libp2p_host, raw_stream_of, run_libp2p_host
from .library_logs import adopt_libp2p_logs
from .network import Handler
from .peer_notices import PeerCallback, PeerNotices
from .round_trips import RoundTrips
from .stranger_dials import StrangerDials
from .streams import Agreement, answering, open_stream_on

logger = logging.getLogger(__name__)

_STREAM_ROUND_TRIPS: Final = 4  # that a stream's opening may take, of which it needs one
_DIAL_ROUND_TRIPS: Final = 10  # that a dial may take, of which it needs six, and relays eight


@asynccontextmanager
async def open_host(identity: Identity, config: HostConfig | None = None) -> AsyncGenerator[Host]:
    """A host that listens and dials until the block ends.

    Raises:
        AddressUnusable: An address of `config.listen` is malformed, taken, or not of this machine.
        ConfigError: One of `config.announce` can be dialled by nobody.
    """
    config = config or HostConfig()
    config = replace(config, listen=tuple(without_missing_ipv6(config.listen)))
    check_listen(config.listen)
    config = replace(config, announce=check_announced(config.announce, identity.peer_id))
    adopt_libp2p_logs()
    counts = Counts()
    gate = Gate(config, lambda why: counts.add("refusals", why))
    raw = new_libp2p_host(identity, config, gate, counts)
    network: Any = raw.get_network()
    listen = [Multiaddr(address) for address in config.listen]
    async with open_nursery() as nursery:
        await nursery.start(run_libp2p_host, raw, listen)
        for address in listen:
            if str(address) not in network.listeners:
                raise AddressUnusable(f"cannot listen on {address}: another process has just taken the port")
        host = Host(identity, config, raw, gate, counts)
        host.stranger_dials.note_own(host.direct_addrs)
        nursery.start_soon(gate.follow_files, host.hang_up_on_unwanted)
        yield host


class Host:
    """Host of this process, a peer among peers. Made by `open_host`."""

    def __init__(
        self, identity: Identity, config: HostConfig, libp2p_host: IHost, gate: Gate, counts: Counts
    ) -> None:
        self.peer_id = identity.peer_id
        self._how_to_ask = f"ask its operator to let in {identity.peer_id}"
        if not identity.lasting:
            self._how_to_ask += ", which changes at every start: --identity FILE keeps the same id"
        self.sign = identity.sign  # the 64-byte Ed25519 signature of some bytes
        self.verify = verify  # (peer id, bytes, signature)
        self.libp2p = libp2p_host
        self.counts = counts
        self.gate = gate
        self.stranger_dials = StrangerDials()
        self._config = config
        self._network: Any = libp2p_host.get_network()
        self.dials: dict[str, Dial] = {}  # under way, by peer
        self._round_trips = RoundTrips()
        self._outside: tuple[str, ...] = ()
        self._relays: tuple[str, ...] = ()
        self._settle: Callable[[str], Awaitable[None]] | None = None
        self._on_unreachable: list[Callable[[PeerUnreachable], None]] = []
        self._watcher = PeerNotices(self._network)
        self._network.register_notifee(self._watcher)
        self.when_connected(lambda peer_id: self.stranger_dials.note_seen(self.remote_address(peer_id)))

    # ------------------------------------------------------------------ who there is

    @property
    def addrs(self) -> tuple[str, ...]:
        """The multiaddrs that others can dial, each with `/p2p/<peer id>`; empty if this host only dials.

        Best first: those that our operator announces, those that a router or a dial-back gave us, some of the
        machine's own, ways through relays. They are no more than fit an announcement: a machine with many
        networks has more.
        """
        relayed = [f"{relay}{CIRCUIT}/p2p/{self.peer_id}" for relay in self._relays[: MAX_ADDRS // 2]]
        return (*self.direct_addrs[: MAX_ADDRS - len(relayed)], *relayed)

    @property
    def direct_addrs(self) -> tuple[str, ...]:
        """Addresses among `addrs` that lead straight here."""
        outside = (f"{address}/p2p/{self.peer_id}" for address in (*self.announced, *self._outside))
        return tuple(dict.fromkeys((*outside, *(str(address) for address in self.libp2p.get_addrs()))))

    @property
    def listening(self) -> tuple[str, ...]:
        """The multiaddrs this host listens on, wildcards and all, with the ports that it got."""
        return tuple(str(each) for each in cast(Any, self.libp2p).get_transport_addrs())

    @property
    def announced(self) -> tuple[str, ...]:
        """The multiaddrs, without a peer id, that lead here by our operator's word."""
        return self._config.announce

    def be_reached_at(self, outside: Sequence[str]) -> None:
        """Tell others these multiaddrs, which lead here from outside, before the machine's own."""
        self._outside = tuple(outside)

    def be_reached_through(self, relays: Sequence[str]) -> None:
        """Tell others these addresses of relays, each with `/p2p/<relay>`, that connect them with us."""
        self._relays = tuple(relays)

    def when_relayed(self, settle: Callable[[str], Awaitable[None]]) -> None:
        """Have `settle` awaited by whoever has just connected to a peer through a relay."""
        self._settle = settle

    def connected_peers(self) -> list[str]:
        """The peers there is a live connection to."""
        return [str(peer) for peer in self._network.connections if self._connection_to(peer) is not None]

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"] | None:
        """Kind of the connection to `peer_id`; direct if there are both, None if there is none."""
        connection = self._connection(peer_id)
        if connection is None:
            return None
        return "relayed" if connection.get_connection_type() == ConnectionType.RELAYED else "direct"

    def remote_address(self, peer_id: str) -> tuple[str, int] | None:
        """The IP address and port that a direct connection to `peer_id` leads to; None if there is none."""
        connection = self._connection(peer_id)
        return None if connection is None else connection.muxed_conn.get_remote_address()

    def local_port(self, peer_id: str) -> int | None:
        """The port that a direct connection to `peer_id` leaves from; None if there is none."""
        connection = self._connection(peer_id)
        if connection is None or connection.get_connection_type() == ConnectionType.RELAYED:
            return None
        return cast("int | None", raw_stream_of(connection).local_port)

    async def dial_from(
        self, peer_id: str, address: str, source: tuple[str, int] | None, *, responding: bool
    ) -> None:
        """Connect to `address`, from a given local one if two dial each other at once.

        Args:
            source: None: any. Then the address is dialled as a stranger's word is.
            responding: Leave the first word of the handshake to the peer.

        Raises:
            BaseLibp2pError: There was no connection, or not with `peer_id`.
            NotDialled: The address may not be dialled at the moment.
        """
        dial = self._network.dial_addr_as_responder if responding else self._network.dial_addr
        dial_tcp = partial(_dial_with, dial, ID.from_base58(peer_id), (source,))
        await self.stranger_dials.dial(peer_id, address, dial_tcp, hearsay=source is None)

    def when_connected(self, callback: PeerCallback) -> None:
        """Have `callback` called with the id of every peer that connects, or is connected to, from now on."""
        self._watcher.on_connected.append(callback)

    def when_disconnected(self, callback: PeerCallback) -> None:
        """Have `callback` called with the id of every peer whose last connection ends, from now on."""
        self._watcher.on_disconnected.append(callback)

    def when_unreachable(self, callback: Callable[[PeerUnreachable], None]) -> None:
        """Have `callback` called with why a peer could not be connected to, whenever a dial fails."""
        self._on_unreachable.append(callback)

    # ------------------------------------------------------------------ streams

    async def open_stream(
        self,
        peer_id: str,
        protocol: str,
        addrs: Sequence[str] = (),
        *,
        hearsay: bool = False,
        optimistic: bool = False,
    ) -> PeerStream:
        """A new stream to `peer_id` that speaks `protocol`; connects first if need be.

        Args:
            addrs: Multiaddrs to reach the peer at, best first, with or without `/p2p/<peer_id>`.
            hearsay: The addresses are a stranger's word: `StrangerDials` says what may be dialled.
            optimistic: Do not wait for the peer to agree to `protocol`: the first receive does, and raises.

        Raises:
            PeerUnreachable: No address answered, or the connection was lost meanwhile.
            NotAdmitted: It does not let us in, or we do not deal with it.
            PeerRefused: It does not speak `protocol`, or opens no more streams for us (code "busy").
        """
        await self.connect(peer_id, addrs, hearsay=hearsay)
        connection = self._connection(peer_id)
        self._note_round_trip(peer_id, connection)
        limit = partial(self.within, self._config.stream_timeout_s, [peer_id], _STREAM_ROUND_TRIPS)
        agreement = Agreement(protocol, peer_id, limit, partial(self._turned_away, peer_id))
        return await open_stream_on(connection, agreement, optimistic)

    def serve(self, protocol: str, handler: Handler, *, is_metered: bool = True) -> None:
        """Let `handler` answer every stream that a peer opens for `protocol`, in a task of its own.

        The stream is closed when the handler returns, and reset when it raises. A `PeerError` is the peer's
        own doing; any other exception is a bug of ours, and logged as such. Neither touches anything else.

        Args:
            is_metered: Count what the handler takes of the event loop among the peer's messages.
        """
        self.libp2p.set_stream_handler(TProtocol(protocol), answering(protocol, handler, is_metered))

    def stop_serving(self, protocol: str) -> None:
        """Refuse `protocol` from now on; streams that are open stay."""
        self.libp2p.remove_stream_handler(TProtocol(protocol))

    # ------------------------------------------------------------------ connections

    async def connect(self, peer_id: str, addrs: Sequence[str] = (), *, hearsay: bool = False) -> None:
        """Make sure there is a live connection to `peer_id`. Callers at the same time share one dial.

        Raises:
            PeerUnreachable: No address answered with that identity.
            NotAdmitted: The peer does not let us in, or we do not deal with it.
        """
        if peer_id == self.peer_id:
            raise PeerUnreachable("this is our own peer id; a node does not dial itself", peer_id)
        if not is_peer_id(peer_id):
            raise PeerUnreachable(f"{peer_id!r} is not a peer id of an Ed25519 key", peer_id)
        if not self.gate.admits(peer_id):
            raise NotAdmitted(f"peer {peer_id} is on our deny list, or not on our allow list", peer_id)
        await trio.lowlevel.checkpoint()  # so a caller that tries again lets a dead connection be noticed
        while self._connection(peer_id) is None:
            ongoing = self.dials.get(peer_id)
            if ongoing is None:
                await self._dial_for_all(peer_id, addrs, hearsay)
                continue
            ongoing.add(addrs)
            await ongoing.done.wait()
            if ongoing.error is not None and ongoing.addrs.issuperset(addrs):
                raise type(ongoing.error)(str(ongoing.error), peer_id) from ongoing.error

    async def hang_up_on_unwanted(self) -> None:
        """End the connections of peers that the lists do not admit any more."""
        with shielded(2):
            async with trio.open_nursery() as nursery:
                for peer, connections in list(self._network.connections.items()):
                    if not self.gate.admits(str(peer)):
                        for each in list(connections):
                            nursery.start_soon(each.close)

    async def ping(self, peer_id: str) -> float:
        """The seconds of one round trip to a connected peer, measured by the muxer: a dozen bytes each way.

        Raises:
            PeerUnreachable: The peer is not connected, or does not answer.
        """
        connection = self._connection(peer_id)
        if connection is None:
            raise PeerUnreachable(f"peer {peer_id} is not connected", peer_id)
        try:
            with trio.fail_after(self._config.stream_timeout_s):
                rtt_s = cast(float, await connection.muxed_conn.ping())
        except (BaseLibp2pError, trio.TooSlowError) as exc:
            raise PeerUnreachable(f"peer {peer_id} does not answer a ping", peer_id) from exc
        self._note_round_trip(peer_id, connection)
        return rtt_s

    def within(
        self, base_s: float, peer_ids: Iterable[str], round_trips: float
    ) -> AbstractContextManager[trio.CancelScope]:
        """Cancel what runs inside after `base_s` and so many round trips to the farthest of the peers.

        It counts those that are known, and from then on those that are found out meanwhile.
        """
        return self._round_trips.within(base_s, peer_ids, round_trips)

    def _note_round_trip(self, peer_id: str, connection: Any) -> None:
        if connection is not None and connection.muxed_conn.rtt_s:
            self._round_trips.note(peer_id, connection.muxed_conn.rtt_s)

    def rtt_s(self, peer_id: str) -> float | None:
        """The round trip as last measured, or what the connection's handshake took; None if not connected."""
        connection = self._connection(peer_id)
        return None if connection is None else connection.muxed_conn.line.rtt_s or None

    def _connection(self, peer_id: str) -> Any:
        """The live connection to use for `peer_id`: a direct one if possible, see `freshest`; or None."""
        peer = libp2p_id(peer_id)
        return None if peer is None else self._connection_to(peer)

    def _connection_to(self, peer: ID) -> Any:
        connections = self._network.connections.get(peer, [])
        live = [each for each in connections if not (each.is_closed or each.muxed_conn.is_closed)]
        direct = [each for each in live if each.get_connection_type() != ConnectionType.RELAYED]
        return freshest(direct or live)

    async def _dial_for_all(self, peer_id: str, addrs: Sequence[str], hearsay: bool) -> None:
        """Dial, while others who want the same peer wait for the outcome."""
        dial = self.dials[peer_id] = Dial(frozenset(addrs))
        try:
            await self._dial(peer_id, list(dict.fromkeys(addrs)), dial.more, hearsay)
        except PeerUnreachable as exc:
            dial.error = exc
            for callback in self._on_unreachable if addrs and not isinstance(exc, NotDialled) else ():
                callback(exc)
            raise
        finally:
            del self.dials[peer_id]
            dial.done.set()

    async def _dial(
        self, peer_id: str, addrs: Sequence[str], more: trio.MemoryReceiveChannel[str], hearsay: bool
    ) -> None:
        if not addrs:
            raise PeerUnreachable(f"no address of peer {peer_id} is known", peer_id)
        target = ID.from_base58(peer_id)
        usable, errors = self.stranger_dials.choose(peer_id, addrs) if hearsay else (addrs, {})
        late: list[str] = []
        dial_tcp = partial(_dial_with, self._network.dial_addr, target, ())

        async def attempt(address: str) -> None:
            on_round_trip.set(partial(self._round_trips.note, peer_id))
            told = hearsay or address not in addrs  # what comes to be known meanwhile is others' word
            if told and address not in usable:
                self.stranger_dials.check_late(peer_id, address, late)
            if is_circuit(address):
                at, relay_id, named = parse_circuit(address)
                check_named(named, peer_id)
                stream = await self.open_stream(relay_id, HOP_PROTOCOL, [at], hearsay=told, optimistic=True)
                await dial_circuit(self._network, stream, at, peer_id)
            else:
                check_named(parse_tcp(address)[3], peer_id)
                await self.stranger_dials.dial(peer_id, address, dial_tcp, hearsay=told)

        self._network.unblock_peer(target)
        with self.within(self._config.dial_timeout_s, [peer_id], _DIAL_ROUND_TRIPS):
            await race(
                [address for address in usable if not is_circuit(address)],
                attempt,
                self._config.dial_stagger_s,
                errors,
                detours=[address for address in usable if is_circuit(address)],
                head_start_s=self._config.relay_head_start_s,
                more=more,
            )
        kind = self.connection_kind(peer_id)
        if kind == "relayed" and self._settle is not None:
            await self._settle(peer_id)
        elif kind is None:
            limit_s = self._config.dial_timeout_s
            raise self._turned_away(peer_id) or dial_failure(peer_id, addrs, errors, limit_s)

    def _turned_away(self, peer_id: str) -> NotAdmitted | None:
        """The error for a peer that has not let us in."""
        why = f"peer {peer_id}: {reason(GATED)}; {self._how_to_ask}"
        return NotAdmitted(why, peer_id) if self.gate.take_turned_away(peer_id) else None


async def _dial_with(dial: Any, target: ID, source: tuple[Any, ...], address: str) -> None:
    await dial(Multiaddr(address), target, *source)
