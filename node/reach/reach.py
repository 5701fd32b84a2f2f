"""Reachability of this host: measures it, maps ports, keeps relays, punches holes, serves as relay.

In order of preference: a public address; a port of the router's, by UPnP; a hole punched when a peer comes
through a relay; the relay. All of it goes on while the host runs, since routers restart and laptops move.
"""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import PeerError
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.concurrency.pulse import AutoResetEvent, Pulse
from p2pinfer.node.host.host import Host
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.transport.addresses import parse_tcp
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.recent import Recent
from p2pinfer.routing.announcement import Announcement

from .circuit import serve_circuits
from .dialback import MAX_PORTS, ask, serve_dialback
from .hole_punch import HolePuncher
from .observers import HURRY_S, Observers
from .own_addresses import hang_up_from, own_addresses, watch_own_addresses
from .reachability import (
    Reachability,
    classify,
    describe,
    is_refuted,
    tcp_address,
    with_announced,
)
from .relay_candidates import relay_candidates
from .relay_config import RelayConfig
from .relay_departure import leave_relays
from .relay_reservations import RelayCandidate, RelayKeeper
from .relay_server import Relay, RelayUse
from .temporary_listener import keep_open, reserve_ports
from .upnp import Mapping, NoMapping, open_mapping
from .wake import drop_silent

logger = logging.getLogger(__name__)

SETTLE_S: Final = 0.2  # after a connection, for the others that come with it
TOGETHER_S: Final = 0.3  # changes that come within this time are told of at once
MAX_PUNCHED: Final = 256  # peers whose last attempt is remembered


@dataclass(frozen=True, slots=True)
class ReachStatus:
    """All of it at one moment, for `p2pinfer doctor` and whoever runs a node."""

    reachability: Reachability
    upnp: str  # one line
    relays: tuple[str, ...]  # that carry connections to us
    punched: tuple[str, ...]  # peers a hole was punched to
    relayed: tuple[str, ...]  # peers it was not
    carried: RelayUse | None  # what we carry for others; None: we do not


class Reach:
    """Reachability of one host. Made by `open_reach`."""

    def __init__(
        self,
        host: Host,
        config: HostConfig,
        relay_config: RelayConfig | None,
        announcements: Callable[[], Sequence[Announcement]],
    ) -> None:
        self.reachability = with_announced(Reachability(), host.announced)
        self.known = trio.Event()  # set once somebody outside has looked and UPnP was tried
        self._host = host
        self._config = config
        self._announcements = announcements
        self._observers = Observers()
        self._upnp = "not tried"
        self._mapping: Mapping | None = None
        self._news = Pulse()
        self._map_again = Pulse()
        self._check_connections = AutoResetEvent()
        self._changed = AutoResetEvent()
        self._listeners: list[Callable[[], None]] = []
        self._punched = Recent[str, bool](MAX_PUNCHED)
        self._listener_wanted = trio.Event()
        self._reserved_ports = [] if host.listening else reserve_ports()
        host.when_disconnected(self._note_loss)  # before the keeper forgets that it was a relay
        self._keeper = RelayKeeper(host, config.relays, self._relay_candidates, self._note_change)
        self._puncher = HolePuncher(
            host,
            self._meeting_points,
            self._source,
            self._let_in,
            wait_s=config.punch_wait_s,
            on_end=self._note_punch,
        )
        self._relay = Relay(host, relay_config, self._may_relay) if relay_config else None
        host.when_connected(self._note_arrival)

    @property
    def status(self) -> ReachStatus:
        """Reachability as far as it is known at the moment."""
        return ReachStatus(
            self.reachability,
            self._upnp,
            self._keeper.relays,
            tuple(peer_id for peer_id, direct in self._punched.items() if direct),
            tuple(peer_id for peer_id, direct in self._punched.items() if not direct),
            self._relay.use if self._relay else None,
        )

    def needs(self, peer_id: str) -> bool:
        """True if we are reached through this peer, or it through us."""
        return peer_id in self._keeper.relays or (self._relay is not None and self._relay.serves(peer_id))

    @contextmanager
    def telling(self, callback: Callable[[], None]) -> Generator[None]:
        """Have `callback` called whenever our addresses, or what we are, have changed, inside the block."""
        self._listeners.append(callback)
        try:
            yield
        finally:
            self._listeners.remove(callback)

    async def serve(self) -> None:
        """Go on until cancelled."""
        serve_dialback(self._host)
        if self._config.punch:
            self._puncher.register()
        serve_circuits(self._host, self._puncher.arrived if self._config.punch else _ignore)
        if self._relay:
            self._relay.register()
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(self._keep_telling)
                if self._config.relays and self._host.listening:
                    nursery.start_soon(self._keeper.serve)
                nursery.start_soon(self._keep_mapping)
                nursery.start_soon(self._keep_checking)
                nursery.start_soon(self._keep_listener)
                nursery.start_soon(leave_relays, self._host, self._announcements)
                nursery.start_soon(watch_own_addresses, self._move)
                await self._keep_looking()
        finally:
            for reserved in self._reserved_ports:
                reserved.close()

    # ------------------------------------------------------------------ what we are

    async def _keep_looking(self) -> None:
        """Ask whoever connects, and everybody again when something has changed, and from time to time."""
        while True:
            news = self._news.next
            await trio.sleep(SETTLE_S)
            if trio.current_time() >= self._observers.next_round_at():
                self._observers.begin_round(trio.current_time())
            await self._ask_around()
            with trio.move_on_at(self._observers.next_round_at()):
                await news.wait()

    async def _ask_around(self) -> None:
        direct = [
            peer for peer in self._host.connected_peers() if self._host.connection_kind(peer) == "direct"
        ]
        fresh, wanted = self._observers.choose(direct, trio.current_time())
        if wanted:
            async with trio.open_nursery() as nursery:
                for peer_id in random.sample(fresh, min(wanted, len(fresh))):
                    self._observers.note_asked(peer_id)
                    nursery.start_soon(self._ask, peer_id)
            self._conclude()
            self._look()  # there may be more

    async def _keep_checking(self) -> None:
        """End connections that are dead, where one was: those that nobody uses would look open for long."""
        while True:
            await self._check_connections.wait()
            await drop_silent(self._host)
            await trio.sleep(HURRY_S)

    async def _move(self, gone: frozenset[str]) -> None:
        logger.info("this computer has other addresses than before: looking how it is reached now")
        self.look_anew()
        await hang_up_from(self._host, gone)

    def look_anew(self) -> None:
        """Ask again at once how we are seen: our line, our router or this machine may be another one."""
        self._map_again.fire()
        self._hurry()

    def _hurry(self) -> None:
        """Ask as soon as may be, and look which connections are dead."""
        self._observers.hurry(trio.current_time())
        self._check_connections.set()
        self._look()

    async def _ask(self, peer_id: str) -> None:
        # A question has room for a few ports; those that are meant for the outside come first.
        ports = [parse_tcp(address)[2] for address in (*self._host.announced, *self._host.listening)]
        if self._listener_wanted.is_set():
            ports += [reserved.getsockname()[1] for reserved in self._reserved_ports]
        if self._mapping:
            ports.append(self._mapping.port)
        try:
            observation = await ask(self._host, peer_id, tuple(dict.fromkeys(ports))[:MAX_PORTS])
        except PeerError as exc:
            logger.debug("reach.unseen peer=%s why=%s", peer_id, exc)
        else:
            self._observers.note(observation, self.reachability, trio.current_time())
            if self._observers.is_hurried:
                self._check_connections.set()

    def _conclude(self) -> None:
        if self._observers.is_outdated:  # beside another address of ours, it would tell of a router
            return
        seen = classify(self._observers.observations.values(), own_addresses())
        before, now = self.reachability, with_announced(seen, self._host.announced)
        self.reachability = now
        if now.kind != "unknown" and (now.kind != "private" or not self._may_map()):
            self.known.set()
        if now.essence != before.essence:
            logger.info("%s", describe(now))
            if is_refuted(seen, self._host.announced):
                logger.warning(
                    "no peer can connect to %s; check that the port is forwarded to a listening port",
                    ", ".join(self._host.announced),
                )
            self._host.be_reached_at(now.addrs)
            self._keeper.look_again(forgives=now.outside_ips != before.outside_ips)  # our own line broke
            self._note_change()

    async def _keep_telling(self) -> None:
        """Tell of changes, those that come together at once."""
        while True:
            await self._changed.wait()
            await trio.sleep(TOGETHER_S)
            for listener in list(self._listeners):
                listener()

    def _note_change(self) -> None:
        self._changed.set()

    def _look(self) -> None:
        self._news.fire()

    def _note_arrival(self, _: str) -> None:  # it may be the very relay that was lost
        self._look()
        self._keeper.look_again()

    def _note_loss(self, peer_id: str) -> None:
        self._observers.forget(peer_id)
        # It may have gone of its own accord. But a router that has another address breaks every connection,
        # and nobody says so.
        if self._observers.is_observer(peer_id) or peer_id in self._keeper.relays:
            self.look_anew()

    # ------------------------------------------------------------------ the router

    def _may_map(self) -> bool:
        """True if UPnP has still to be tried. For a client only once a peer cannot be met otherwise."""
        wanted = bool(self._host.listening) or self._listener_wanted.is_set()
        return self._config.upnp and wanted and self._upnp == "not tried"

    async def _keep_mapping(self) -> None:
        """Ask for a port of each router that we turn out to be behind: a laptop moves from one to another."""
        while self._config.upnp:
            while not (self.reachability.kind == "private" and self.reachability.nat != "firewall"):
                await self._next_change()
            if not self._host.listening:
                await self._listener_wanted.wait()
            inside = self._source(False)
            if not (inside and self._may_map()):
                return
            before = self.reachability.outside_ips
            await self._map(inside[1])
            while self.reachability.outside_ips == before:
                await self._next_change()
            self._upnp = "not tried"

    async def _map(self, inside: int) -> None:
        """Hold a port of the router's, and see if that helps; returns if there is none."""
        try:
            async with open_mapping(inside, self._note_mapping, self._map_again) as mapping:
                self._note_mapping(mapping)
                self._observers.begin_round(trio.current_time())
                await self._ask_around()
                if self.reachability.kind == "private":
                    self._upnp += ", but that is not seen from outside: there is another router behind it"
                self.known.set()
                await trio.sleep_forever()
        except NoMapping as exc:
            self._upnp = str(exc)
            logger.debug("reach.no_mapping why=%s", exc)
            self.known.set()
        finally:
            self._mapping = None

    def _note_mapping(self, mapping: Mapping) -> None:
        """Take in what the router says; that its address is another one, peers are asked about at once."""
        if self._mapping is not None and self._mapping.ip != mapping.ip:
            logger.info("the router's address is %s now, and was %s", mapping.ip, self._mapping.ip)
            self._hurry()
        self._mapping = mapping
        self._upnp = f"the router maps its port {mapping.port} at {mapping.ip} to this node"

    async def _next_change(self) -> None:
        changed = trio.Event()
        with self.telling(changed.set):
            await changed.wait()

    async def _keep_listener(self) -> None:
        """Let peers in at a client's port once one of them cannot be met in another way."""
        await self._listener_wanted.wait()
        async with trio.open_nursery() as nursery:
            for reserved in self._reserved_ports:
                ip, port, *_ = reserved.getsockname()
                await nursery.start(keep_open, self._host, ip, port)
            self._hurry()

    def _let_in(self) -> bool:
        """Make ourselves as reachable as can be, now that somebody has to dial us."""
        self._listener_wanted.set()
        return self._is_reachable() or self.reachability.nat in ("firewall", "none")

    # ------------------------------------------------------------------ relays

    def _is_reachable(self) -> bool:
        return self.reachability.kind in ("public", "mapped")

    def _may_relay(self, stream: PeerStream) -> bool:
        """True if a place here is worth anything: we can be reached, or its taker at least has reached us."""
        unknown = self.reachability.kind == "unknown"
        return self._is_reachable() or (unknown and stream.is_inbound)

    def _relay_candidates(self) -> list[RelayCandidate]:
        is_private = self.reachability.kind == "private"
        seen = self._observers.observations.values()
        return relay_candidates(self._host, seen, self._announcements()) if is_private else []

    # ------------------------------------------------------------------ punching

    def _meeting_points(self) -> list[str]:
        """Addresses where a peer that dials at the same moment as we do meets us."""
        seen = self.reachability
        if self._is_reachable():
            return [address for address in seen.addrs if address.startswith(("/ip4/", "/ip6/"))]
        if seen.nat not in ("port-preserving", "firewall", "none"):
            return []
        sources = [(ip, self._source(":" in ip)) for ip in seen.outside_ips]
        return [tcp_address((ip, source[1])) for ip, source in sources if source is not None]

    def _source(self, six: bool) -> tuple[str, int] | None:
        """The address and port to dial from."""
        family = socket.AF_INET6 if six else socket.AF_INET
        for reserved in self._reserved_ports:
            if reserved.family == family:
                ip, port, *_ = reserved.getsockname()
                return str(ip), int(port)
        for address in self._host.listening:
            protocol, ip, port, _ = parse_tcp(address)
            if (protocol == "ip6") == six:
                return ip, port
        return None

    def _note_punch(self, peer_id: str, direct: bool) -> None:
        self._punched[peer_id] = direct


@asynccontextmanager
async def open_reach(
    host: Host,
    config: HostConfig,
    relay_config: RelayConfig | None,
    announcements: Callable[[], Sequence[Announcement]],
) -> AsyncGenerator[Reach]:
    """Be reached as well as the network allows until the block ends.

    Args:
        relay_config: None: carry nothing for others.
        announcements: Gives all that is known of who serves what: some of them relay.
    """
    relays = relay_config is not None and relay_config.granted_bytes_per_s > 0
    reach = Reach(host, config, relay_config if relays else None, announcements)
    async with open_nursery() as nursery:
        nursery.start_soon(reach.serve)
        yield reach


async def _ignore(peer_id: str) -> None:
    await trio.sleep_forever()
