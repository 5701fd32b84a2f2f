"""Membership of a swarm: host, gossip, live table, neighbours and latencies in one context manager.

Nodes and clients join in the same way; a node announces, a client only listens.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator, Callable, Generator
from collections.abc import Sequence as SequenceOf
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from p2pinfer.errors import NotAdmitted, PeerError, PeerUnreachable
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.node.concurrency.nurseries import bare_errors, open_nursery, outlasting
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence.store import EvidenceStore, serve_evidence
from p2pinfer.node.host.host import Host, HostConfig, open_host
from p2pinfer.node.host.whereabouts import Whereabouts
from p2pinfer.node.reach.reach import Reach, open_reach
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.reach.wake import drop_silent, watch_for_sleep
from p2pinfer.node.transport.identity import Identity
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.coordinates import Coordinate
from p2pinfer.routing.hearsay import Hearsay, in_turns

from .anti_entropy import AntiEntropy
from .bootstrap import BootstrapOutcome, BootstrapPeer, Neighbourhood, bootstrap_peers
from .connection_pruning import ConnectionPruning
from .duplicate_identity import DuplicateDetector
from .gossip import Gossip, open_gossip
from .identity_check import DuplicateCheck
from .latency import Latency
from .live_table import LiveTable
from .mdns import keep_looking_around
from .peer_book import CLIENT_FILE_NAME, PeerBook
from .presence import Presence, keep_dials_fresh
from .proof_gossip import ProofCarrier, new_carrier
from .sequence import Sequence
from .snapshot import fetch_snapshot, serve_snapshots

logger = logging.getLogger(__name__)

LOOKED_AT: Final = 3  # peers of one model that are tried, to hear of the others
LOOK_S: Final = 5.0  # for each of them
SLOW_S: Final = 8.0  # how long a peer that we are connected to has to hand its table over
REJOIN_S: Final = 30.0  # how long neighbours are waited for after a sleep
REJOIN_LOOK_S: Final = 0.1
MESH_S: Final = 1.5  # until gossip reaches those who were met again
SETTLE_ROUND_TRIPS: Final = 12  # to the farthest first peer, for connecting and its table
INTRODUCTION_S: Final = 3.0  # for a client to hand over what it knows of a hop's successor
INTRODUCTION_EVERY_S: Final = 30.0  # by one client, on average: a table is kilobytes
INTRODUCTIONS_AT_ONCE: Final = 4
LAN_S: Final = 2.0  # how long peers in the local network have to answer, where nobody else is known


class SwarmMember:
    """Membership of this process in a swarm. Made by `open_swarm`.

    Attributes:
        proofs: The fraud proofs that were heard of.
        evidence: What was committed to in sessions here, for whoever asks.
        presence: Who of those announced was heard, or was silent.
        whereabouts: Where they were found.
    """

    def __init__(
        self,
        host: Host,
        view: LiveTable,
        gossip: Gossip,
        peers: Neighbourhood,
        latency: Latency,
        reach: Reach,
        proofs: ProofCarrier,
        evidence: EvidenceStore,
        *,
        duplicates: DuplicateDetector | None = None,
        sequence: Sequence | None = None,
        looks_around: bool = False,
    ) -> None:
        self.host = host
        self.proofs = proofs
        self.evidence = evidence
        self.peer_id = host.peer_id
        self.presence = Presence(host, view)
        self.whereabouts = Whereabouts(host, view.everybody)
        self._view = view
        self._gossip = gossip
        self._neighbourhood = peers
        self._latency = latency
        self.reach = reach
        self.duplicates = duplicates or DuplicateDetector(host.peer_id)
        self.sequence = sequence or Sequence()
        self._looks_around = looks_around
        self._rng = random.Random()
        self._disputes: list[Callable[[], None]] = []
        self._introductions = RateLimit(1 / INTRODUCTION_EVERY_S, INTRODUCTIONS_AT_ONCE)
        self.sequence.when_overtaken(self.dispute)

    @property
    def addrs(self) -> tuple[str, ...]:
        """The multiaddrs that others can dial us at."""
        return self.host.addrs

    @property
    def coordinate(self) -> Coordinate:
        """Network coordinate of this process."""
        return self._latency.coordinate

    @property
    def table_changed(self) -> trio.Event:
        """Set with the next piece of news about who serves what. Fetch it before you look at the table."""
        return self._view.changed

    def rtt_ms(self, peer_id: str) -> float | None:
        """The last measured round trip to a peer."""
        return self._latency.rtt_ms(peer_id)

    def announcements(self, revision: str) -> list[Announcement]:
        """Announcements of `revision`, our own included; without peers that the lists exclude."""
        return [peer for peer in self._view.live(revision) if self._deals_with(peer.peer_id)]

    def hearsay(self, revision: str) -> list[Hearsay]:
        """The peers of `announcements`, with how we came to know of each."""
        return [each for each in self._view.hearsay(revision) if self._deals_with(each.announcement.peer_id)]

    def has_met(self, peer_id: str) -> bool:
        """True if the peer has proved its key to this process."""
        return self._view.has_met(peer_id)

    async def addresses_of(self, peer_id: str, revision: str, asker: str) -> tuple[str, ...]:
        """Addresses that a peer has signed for itself; empty if nobody knows any.

        Args:
            revision: What it is said to serve.
            asker: The connected peer that names it; its table is asked if ours lacks the peer.
        """
        addrs = self._view.addrs_of(peer_id)
        if not addrs and self._introductions.take(asker, trio.current_time()):
            with trio.move_on_after(INTRODUCTION_S), suppress(PeerError):
                await fetch_snapshot(self.host, self._view, asker, revision, self.proofs)
            addrs = self._view.addrs_of(peer_id)
        return addrs

    def _deals_with(self, peer_id: str) -> bool:
        return peer_id == self.peer_id or self.host.gate.admits(peer_id, "nodes")

    def lookalikes(self, spec: ModelSpec) -> list[Announcement]:
        """Peers with the weights of `spec` under a config by which they compute something else."""
        return [
            peer
            for peer in self._view.everybody()
            if peer.weights
            and peer.weights == spec.weights
            and peer.revision != spec.revision
            and self._deals_with(peer.peer_id)
        ]

    def models(self) -> dict[str, list[Announcement]]:
        """Announcements by revision; of models that were not joined, a few peers each."""
        models = {revision: self.announcements(revision) for revision in self._view.models()}
        return {revision: peers for revision, peers in models.items() if peers}

    @contextmanager
    def disputed(self, callback: Callable[[], None]) -> Generator[None]:
        """Have `callback` called inside the block when others hold in our name what we have not said."""
        self._disputes.append(callback)
        try:
            yield
        finally:
            self._disputes.remove(callback)

    def dispute(self) -> None:
        """Have our announcement made again: others hold something else in our name."""
        for callback in list(self._disputes):
            callback()

    async def wake_up(self, slept_s: float) -> None:
        """Take up everything again after this computer or process has slept: the swarm takes us for gone."""
        logger.warning(
            "this process slept for %.0f s: connections are checked, and the swarm is told that we are here",
            slept_s,
        )
        self.reach.look_anew()
        self.dispute()  # what the first neighbour that we meet again gets to know
        await drop_silent(self.host)
        with trio.move_on_after(REJOIN_S):
            while not self.host.connected_peers():
                await trio.sleep(REJOIN_LOOK_S)
        await trio.sleep(MESH_S)
        self.dispute()  # what gossip carries to everybody

    async def keep_to(self, peer_ids: SequenceOf[str]) -> None:
        """Have to do with these peers alone from now on, and hang up on all others."""
        self._neighbourhood.close()
        self.host.gate.admit_only(peer_ids)
        await self.host.hang_up_on_unwanted()

    async def look_into(self, revision: str) -> None:
        """Take in what peers of a model that was not joined know of it, if any of them answers."""
        for peer in in_turns(self.hearsay(revision), self._rng)[:LOOKED_AT]:
            try:
                with trio.fail_after(LOOK_S):
                    await self.host.connect(peer.peer_id, peer.addrs, hearsay=True)
                    await fetch_snapshot(self.host, self._view, peer.peer_id, revision, self.proofs)
                return
            except (PeerError, trio.TooSlowError) as exc:
                logger.debug("swarm.not_looked_into peer=%s why=%s", peer.peer_id, exc)

    async def join(self, revision: str) -> None:
        """Hear of everybody who serves `revision`."""
        await self._gossip.join(revision)

    async def announce(self, announcement: Announcement) -> None:
        """Tell the swarm what we serve."""
        await self._gossip.announce(announcement)

    async def follow_neighbours(self) -> None:
        """Pass on what the neighbours care about, whatever it is; until cancelled."""
        await self._gossip.follow_neighbours()

    async def wait_settled(self, timeout_s: float) -> bool:
        """Wait until a neighbour's table was taken in; False if nobody is there, lets us in, or is quick."""
        if self._neighbourhood.has_peers or self._looks_around:
            limit_s = timeout_s if self._neighbourhood.has_peers else min(timeout_s, LAN_S)
            with self.host.within(limit_s, self._neighbourhood.peer_ids, SETTLE_ROUND_TRIPS):
                await self._neighbourhood.decided.wait()
        return self._neighbourhood.settled.is_set()

    def describe_failures(self) -> str:
        """Bootstrap peers that could not be reached and why, in one line; empty if all could."""
        return self._neighbourhood.describe_failures()

    def bootstrap_outcomes(self) -> list[BootstrapOutcome]:
        """Outcome of every bootstrap peer."""
        return self._neighbourhood.outcomes()

    async def reach_somebody(self, timeout_s: float) -> None:
        """Wait as `wait_settled` does, for those who can do nothing alone. Who has connected may take longer.

        Raises:
            NotAdmitted: All those that there are to ask answered, and turned us away.
            PeerUnreachable: Nobody answered in time, or there is nobody to ask.
        """
        settled = await self.wait_settled(timeout_s)
        if not settled and self._neighbourhood.decided.is_set():
            raise NotAdmitted(f"every peer rejected this one: {self._neighbourhood.describe_failures()}")
        if not settled and self.host.connected_peers():
            settled = await self.wait_settled(SLOW_S)
        if not settled:
            tried = self._neighbourhood.describe_failures()
            raise PeerUnreachable(
                "no peer of a swarm answered; name one that does by --bootstrap or in bootstrap_peers.txt"
                + (f" ({tried})" if tried else "")
            )


@asynccontextmanager
async def open_swarm(
    identity: Identity,
    host_config: HostConfig,
    bootstrap: SequenceOf[str],
    data_dir: Path,
    relay_config: RelayConfig | None = None,
    serve_config: ServeConfig | None = None,
    *,
    remembers: bool = False,
) -> AsyncGenerator[SwarmMember]:
    """Join the swarm until the block ends.

    Args:
        relay_config: What may be spent on carrying others' connections; None: nothing.
        serve_config: Says how much of what receipts and fraud proofs name is kept for others.
        remembers: Keep in `data_dir` how far our announcements are counted, as fits a node with an identity
            of its own. Which peers were met is kept there by all.

    Raises:
        ConfigError: A bootstrap address is malformed.
        AddressUnusable: An address to listen on is malformed, taken, or not of this machine.
    """
    first_peers = bootstrap_peers(bootstrap, data_dir)
    # Whoever is cancelled still says goodbye: a node to the swarm, a client to its hops.
    async with outlasting(
        _open_member(
            identity,
            host_config,
            first_peers,
            relay_config,
            serve_config or ServeConfig(),
            data_dir,
            remembers,
        )
    ) as member:
        yield member


@asynccontextmanager
async def _open_member(
    identity: Identity,
    host_config: HostConfig,
    first_peers: SequenceOf[BootstrapPeer],
    relay_config: RelayConfig | None,
    serve: ServeConfig,
    data_dir: Path,
    remembers: bool,
) -> AsyncGenerator[SwarmMember]:
    sequence, book = await trio.to_thread.run_sync(_memories, data_dir, remembers, first_peers)
    duplicates = DuplicateDetector(identity.peer_id)
    view = LiveTable(duplicates=duplicates)
    view.on_overtaken = sequence.overtaken
    with bare_errors():
        async with (
            open_host(identity, host_config) as host,
            open_gossip(host, identity, view) as gossip,
            open_reach(host, host_config, relay_config, view.everybody) as reach,
            open_nursery() as nursery,
        ):
            host.stranger_dials.teller = view.teller
            latency = Latency(host, view.everybody)
            evidence = EvidenceStore(serve.evidence_bytes, serve.evidence_keep_s)
            proofs = new_carrier(host, gossip, serve, view)
            gossip.on_notice = proofs.hear
            await gossip.join_all_models()
            view.is_foreign = lambda revision: bool(ours := gossip.revisions) and revision not in ours
            neighbourhood = Neighbourhood(host, view, first_peers, proofs, gossip, book)
            calls = DuplicateCheck(identity, host_config, duplicates, sequence)
            calls.serve(host)
            advertised = [address for address in host.direct_addrs if not _is_loopback(address)]
            looks_around = host_config.mdns and (bool(advertised) or not first_peers)
            if looks_around:
                nursery.start_soon(keep_looking_around, advertised, neighbourhood.add)
            serve_evidence(host, evidence, *proofs.stores)
            serve_snapshots(host, view, proofs)
            nursery.start_soon(neighbourhood.keep)
            nursery.start_soon(latency.serve)
            nursery.start_soon(ConnectionPruning(host, reach.needs).keep)
            nursery.start_soon(
                AntiEntropy(
                    host, view, lambda: gossip.revisions, proofs, is_urgent=lambda: bool(duplicates.suspect)
                ).serve
            )
            nursery.start_soon(proofs.serve)
            nursery.start_soon(book.keep)
            member = SwarmMember(
                host,
                view,
                gossip,
                neighbourhood,
                latency,
                reach,
                proofs,
                evidence,
                duplicates=duplicates,
                sequence=sequence,
                looks_around=looks_around,
            )
            member.presence.watch()
            member.whereabouts.watch()
            if not remembers:  # a node chooses no routes, and has no use for what names stand for
                nursery.start_soon(member.whereabouts.serve)

            def look_for_twin(suspect: Announcement) -> None:
                member.dispute()
                nursery.start_soon(calls.call, suspect.addrs)

            duplicates.on_suspect = look_for_twin
            if neighbourhood.ours:
                nursery.start_soon(calls.keep_calling, neighbourhood.ours)
            nursery.start_soon(watch_for_sleep, member.wake_up)
            nursery.start_soon(keep_dials_fresh, host, view)
            yield member


def _memories(
    data_dir: Path, remembers: bool, first_peers: SequenceOf[BootstrapPeer]
) -> tuple[Sequence, PeerBook]:
    """A node's count of its announcements, and the peers met in earlier runs.

    A client remembers the latter too, since those it is told to begin with may be others today. But it is
    used for one swarm and then for another: only what was met together with one of those still counts.
    """
    if remembers:
        return Sequence(data_dir), PeerBook(data_dir)
    book = PeerBook(data_dir, file_name=CLIENT_FILE_NAME) if first_peers else PeerBook()
    book.begin_with({peer.peer_id: peer.addrs for peer in first_peers})
    return Sequence(), book


def _is_loopback(address: str) -> bool:
    return address.startswith(("/ip4/127.", "/ip6/::1/"))
