"""A swarm in memory: real blocks, real servers and sessions, announcements that everybody sees at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import trio

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.compute.runner import SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.events import Event
from p2pinfer.node.evidence.store import EvidenceStore, serve_evidence
from p2pinfer.node.host.host import Host
from p2pinfer.node.reach.reach import Reach, ReachStatus
from p2pinfer.node.reach.reachability import Reachability
from p2pinfer.node.serve.decode_speed import DecodeSpeed
from p2pinfer.node.serve.forward import ServedSpan
from p2pinfer.node.serve.server import SpanServer
from p2pinfer.node.serve.session_control import FindAddrs
from p2pinfer.node.serve.worker import open_worker
from p2pinfer.node.swarm.bootstrap import BootstrapOutcome, Neighbourhood
from p2pinfer.node.swarm.gossip import Gossip
from p2pinfer.node.swarm.latency import Latency
from p2pinfer.node.swarm.live_table import LiveTable
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.node.swarm.proof_gossip import Heard, Notice, ProofCarrier
from p2pinfer.node.training.offered_adapters import offer_adapters
from p2pinfer.node.training.train_server import TrainServer
from p2pinfer.routing.announcement import Announcement, OfferedAdapter
from p2pinfer.routing.coordinates import Coordinate
from p2pinfer.routing.route import Hop, Route

from .memory import MemoryNetwork

FLOAT32 = ComputeConfig(device="cpu", dtype="float32", threads=1, cache_bytes=64 << 20)
LIMIT_S = 60.0


@dataclass(frozen=True)
class Served:
    """What a peer of the swarm runs."""

    runner: SpanRunner
    server: SpanServer
    training: TrainServer


class MemoryGossip:
    """Puts an announcement into the view that all members share."""

    def __init__(self, view: LiveTable) -> None:
        self.joined: set[str] = set()
        self.announced: list[Announcement] = []
        self.carriers: dict[str, ProofCarrier] = {}
        self._view = view

    async def join(self, revision: str) -> None:
        await trio.lowlevel.checkpoint()
        self.joined.add(revision)

    async def announce(self, announcement: Announcement) -> None:
        await trio.lowlevel.checkpoint()
        self.announced.append(announcement)
        self._view.accept(announcement, b"record")

    async def publish_notice(self, notice: Notice) -> bytes:
        await trio.lowlevel.checkpoint()
        now = trio.current_time()
        author = next(peer_id for peer_id, each in self.carriers.items() if each.store.get(notice.proof, now))
        for peer_id, carrier in self.carriers.items():
            if peer_id != author:
                carrier.hear(Heard(notice, author))
        return b"record"

    async def follow_neighbours(self) -> None:
        await trio.sleep_forever()


class MemoryReach:
    """A host that is reached as it is."""

    def __init__(self) -> None:
        self.reachability = Reachability("public", "none")
        self.listeners: list[Callable[[], None]] = []

    @property
    def status(self) -> ReachStatus:
        """Nobody is relayed to or from here."""
        return ReachStatus(self.reachability, "", (), (), (), None)

    @contextmanager
    def telling(self, callback: Callable[[], None]) -> Generator[None]:
        self.listeners.append(callback)
        try:
            yield
        finally:
            self.listeners.remove(callback)


class MemoryNeighbourhood:
    """Neighbours that have told all they know."""

    def __init__(self) -> None:
        self.has_peers = True
        self.peer_ids: tuple[str, ...] = ()
        self.settled = trio.Event()
        self.settled.set()
        self.decided = self.settled

    def describe_failures(self) -> str:
        return "it is out of reach"

    def outcomes(self) -> list[BootstrapOutcome]:
        """There are no bootstrap peers."""
        return []


class MemorySwarm:
    """Peers that serve a checkpoint to each other. Made by `open_memory_swarm`."""

    def __init__(self, nursery: trio.Nursery, stack: AsyncExitStack, checkpoint: Checkpoint) -> None:
        self.network = MemoryNetwork(nursery)
        self.view = LiveTable()
        self.gossip = MemoryGossip(self.view)
        self.neighbourhood = MemoryNeighbourhood()
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.served: dict[str, Served] = {}
        self.events: list[Event] = []
        self._stack = stack
        self._sequence = 0

    def member(self, peer_id: str) -> SwarmMember:
        """A place in the swarm."""
        host = self.network.host(peer_id)
        evidence = EvidenceStore(64 << 20, 900)
        proofs = ProofCarrier(host, EvidenceStore(64 << 20, 900), self.gossip)
        serve_evidence(host, evidence, proofs.store)
        self.gossip.carriers[peer_id] = proofs
        self.network.nursery.start_soon(proofs.serve)
        return SwarmMember(
            cast(Host, host),
            self.view,
            cast(Gossip, self.gossip),
            cast(Neighbourhood, self.neighbourhood),
            Latency(host, self.view.everybody),
            cast(Reach, MemoryReach()),
            proofs,
            evidence,
        )

    async def serve(
        self,
        peer_id: str,
        start: int = 0,
        stop: int = 8,
        *,
        compute: ComputeConfig = FLOAT32,
        tokens_per_s: float = 100.0,
        config: ServeConfig | None = None,
        find_addrs: FindAddrs | None = None,
        ends: EmbeddingAndHead | None = None,
        adapters: Sequence[Path] = (),
    ) -> Served:
        """Let a new peer serve a span, and announce it."""
        config = config or ServeConfig()
        runner = open_runner(self.checkpoint, BlockSpan(start, stop), compute)
        worker = await self._stack.enter_async_context(open_worker(config.max_batch_tokens))
        offered = ServedSpan(self.spec, runner, worker, DecodeSpeed(tokens_per_s), ends=ends)
        host = self.network.host(peer_id)
        evidence = EvidenceStore(64 << 20, 900)
        serve_evidence(host, evidence)
        offers = offer_adapters([*map(str, adapters)], offered, evidence)
        server = SpanServer(
            host, offered, config, self.events.append, evidence=evidence, find_addrs=find_addrs
        )
        server.register()
        training = TrainServer(host, offered, config)
        training.register()
        self.served[peer_id] = Served(runner, server, training)
        dtype = str(runner.numerics)
        self.announce(
            peer_id,
            start,
            stop,
            tokens_per_s=tokens_per_s,
            dtype=dtype,
            ends=ends is not None,
            adapters=offers,
        )
        return self.served[peer_id]

    def announce(
        self,
        peer_id: str,
        start: int = 0,
        stop: int = 8,
        *,
        tokens_per_s: float = 100.0,
        dtype: str = "float32",
        free_cache_tokens: int = 4096,
        leaving: bool = False,
        told_by: str = "",
        addrs: tuple[str, ...] = (),
        coordinate: Coordinate | None = None,
        ends: bool = False,
        adapters: tuple[OfferedAdapter, ...] = (),
        packs: bool = True,
    ) -> Announcement:
        """Say of a peer that it serves a span, whether or not it does."""
        self._sequence += 1
        announcement = Announcement(
            peer_id=peer_id,
            model=self.spec.model,
            revision=self.spec.revision,
            span=BlockSpan(start, stop),
            dtype=dtype,
            tokens_per_s=tokens_per_s,
            free_cache_tokens=free_cache_tokens,
            sequence=self._sequence,
            addrs=addrs or (f"/memory/{peer_id}",),
            leaving=leaving,
            coordinate=coordinate,
            weights=self.spec.weights,
            numbers=self.spec.numbers,
            ends=ends,
            adapters=adapters,
            packs=packs,
        )
        self.view.accept(announcement, b"record", told_by=told_by)
        return announcement

    async def all_closed(self) -> None:
        """Until no session is left and every reservation is back."""
        while any(
            each.server.sessions or each.runner.cache.free_tokens < each.runner.cache.capacity_tokens
            for each in self.served.values()
        ):
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_memory_swarm(
    checkpoint: Checkpoint, *, limit_s: float = LIMIT_S
) -> AsyncGenerator[MemorySwarm]:
    """A swarm without peers, to be filled; it ends with the block, which may take so long at most."""
    async with AsyncExitStack() as stack, open_nursery() as nursery:
        with trio.fail_after(limit_s):
            yield MemorySwarm(nursery, stack, checkpoint)


def route_over(**spans: tuple[int, int]) -> Route:
    """`route_over(a=(0, 3), b=(3, 8))`."""
    return Route(tuple(Hop(peer_id, BlockSpan(*span)) for peer_id, span in spans.items()))


def reserve_all(served: Served) -> None:
    """Leave no room in a peer's cache."""
    served.runner.cache.reserve(served.runner.cache.free_tokens)
