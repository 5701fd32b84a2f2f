"""Life of a serving node, from its identity to its farewell.

    identity -> model -> network -> look at the swarm -> choose blocks -> load -> serve -> announce -> leave

A node that may choose its blocks looks again from time to time, and starts over from "choose blocks" when
the swarm would gain enough by it and nobody is being served at the moment.
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import cast

import trio

from p2pinfer.errors import ModelNotFound, SpanOutOfRange
from p2pinfer.models.checkpoint.source import ModelSource, resolve_model
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.runner import SpanRunner, open_runner
from p2pinfer.models.compute.target import choose_targets
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.machine.cores import usable_cores
from p2pinfer.models.machine.memory import refusals_named
from p2pinfer.models.pieces.manifest import SwarmName, parse_swarm_name
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.census import take_census
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.ends.held_ends import load_held_ends
from p2pinfer.node.host.host import HostConfig
from p2pinfer.node.host.last_ports import remember_ports, with_last_ports
from p2pinfer.node.reach.relay_config import RelayConfig
from p2pinfer.node.serve.announcer import Announcer
from p2pinfer.node.serve.capacity import Capacity, check_room, measure_capacity, measure_speed
from p2pinfer.node.serve.decode_speed import DecodeSpeed
from p2pinfer.node.serve.forward import ServedSpan
from p2pinfer.node.serve.last_span import last_span, remember_span
from p2pinfer.node.serve.server import SpanServer
from p2pinfer.node.serve.tuning import Tuner, find_threads
from p2pinfer.node.serve.worker import Worker, open_worker
from p2pinfer.node.swarm.membership import SwarmMember, open_swarm
from p2pinfer.node.training.offered_adapters import offer_adapters
from p2pinfer.node.training.train_server import TrainServer
from p2pinfer.node.transport.addresses import check_announced
from p2pinfer.node.transport.identity import KEY_FILE, Identity, load_identity
from p2pinfer.node.weights.config import WeightsConfig
from p2pinfer.node.weights.node_weights import lend_weights
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import PlacementConfig
from p2pinfer.routing.placement import choose_span, should_move

from .account import reached, ready, stopped, tell_joined
from .config import NodeConfig as NodeConfig
from .config import ServeConfig
from .data_lock import hold_data_dir
from .events import Event, Loading, NodeLeaving, Ready, Starting
from .metrics import Metrics, serve_metrics

logger = logging.getLogger(__name__)

_INTRODUCER_LOOP_SHARE = 0.8  # of a core: gossip is what a node without blocks is for
_FEWER_BLOCKS = (
    "serve fewer blocks (--num-blocks), set compute.cache_bytes to less, or raise the limit if there is one"
)


async def run_node(
    config: NodeConfig,
    *,
    host_config: HostConfig | None = None,
    compute_config: ComputeConfig | None = None,
    serve_config: ServeConfig | None = None,
    relay_config: RelayConfig | None = None,
    weights_config: WeightsConfig | None = None,
    report: Callable[[Event], None] = lambda _: None,
    progress: Progress | None = None,
) -> None:
    """Serve until cancelled, then say goodbye to the swarm.

    Args:
        report: Called with everything an operator may want to see, `Ready` among it.

    Raises:
        LocalError: Something this machine lacks or the configuration gets wrong; nothing was served.
    """
    node = _Node(
        config,
        compute_config or ComputeConfig(),
        serve_config or ServeConfig(),
        relay_config or RelayConfig(),
        weights_config or WeightsConfig(),
        report,
        progress,
    )
    await node.run(host_config or HostConfig())


class _Node:
    """The configuration of one `run_node`, and its steps."""

    def __init__(
        self,
        config: NodeConfig,
        compute: ComputeConfig,
        serve: ServeConfig,
        relay: RelayConfig,
        weights: WeightsConfig,
        report: Callable[[Event], None],
        progress: Progress | None,
    ) -> None:
        self._config = config
        self._compute = compute
        self._serve = serve
        self._relay = relay
        self._weights_config = weights
        self._report = report
        self._progress = progress
        self._metrics: Metrics | None = None

    async def run(self, host_config: HostConfig) -> None:
        with hold_data_dir(self._config.data_dir):
            await self._run(host_config)

    async def _run(self, host_config: HostConfig) -> None:
        config = self._config
        if config.no_blocks:  # its event loop has nothing else to do
            host_config = replace(host_config, loop_share=max(host_config.loop_share, _INTRODUCER_LOOP_SHARE))
        identity = load_identity(config.data_dir)
        check_announced(host_config.announce, identity.peer_id)  # before gigabytes are fetched
        if config.no_blocks:
            async with self._open_swarm(identity, host_config) as member:
                await self._introduce(member)
            return
        name, source = parse_swarm_name(config.model), None
        if name is None:
            # What may take minutes is abandoned on Ctrl-C: its thread ends with the process.
            source = await trio.to_thread.run_sync(self._resolve, abandon_on_cancel=True)
            self._wanted_blocks(source.spec)  # a wrong span is told before anybody is met
        async with self._open_swarm(identity, host_config) as member:
            is_private = host_config.swarm_key is not None
            with lend_weights(
                member, self._weights_config, config, is_private=is_private, progress=self._progress
            ) as self._weights:
                source = source or await self._weights.find(cast(SwarmName, name))
                await self._serve_model(source, member)

    async def _serve_model(self, source: ModelSource, member: SwarmMember) -> None:
        spec, wanted = source.spec, self._wanted_blocks(source.spec)
        self._report(Starting(member.peer_id, member.addrs, spec.model, spec.revision))
        await member.join(spec.revision)
        if wanted is not None:
            await trio.to_thread.run_sync(check_room, spec, wanted, self._compute)
            await self._serve_span(source, member, wanted, "asked for", may_move=False)
        else:
            await self._serve_where_needed(source, member)

    @asynccontextmanager
    async def _open_swarm(self, identity: Identity, host_config: HostConfig) -> AsyncGenerator[SwarmMember]:
        config, since = self._config, trio.current_time()
        listen = await trio.to_thread.run_sync(with_last_ports, host_config.listen, config.data_dir)
        async with open_swarm(
            identity,
            replace(host_config, listen=listen),
            config.bootstrap,
            config.data_dir,
            self._relay,
            self._serve,
            remembers=True,
        ) as member:
            await trio.to_thread.run_sync(remember_ports, config.data_dir, member.host.listening)
            with member.reach.telling(lambda: self._report(reached(member))):
                async with self._open_metrics(member), open_nursery() as nursery:
                    nursery.start_soon(member.duplicates.wait_taken, config.data_dir / KEY_FILE)
                    nursery.start_soon(tell_joined, member, self._report)
                    try:
                        yield member
                    finally:
                        self._report(stopped(member, since))

    @asynccontextmanager
    async def _open_metrics(self, member: SwarmMember) -> AsyncGenerator[None]:
        """Serve metrics until the block ends, if somebody wants them."""
        config = self._config
        async with open_nursery() as nursery:
            if config.metrics_port is not None:
                self._metrics = Metrics(member.host)
                await nursery.start(serve_metrics, self._metrics, config.metrics_address, config.metrics_port)
            yield

    async def _introduce(self, member: SwarmMember) -> None:
        """Hold no blocks: pass on what is gossiped, tell newcomers who is there."""
        relaying = self._relay.granted_bytes_per_s
        self._report(
            Ready(member.peer_id, member.addrs, "", "", None, "", "", 0.0, 0, relay_bytes_per_s=relaying)
        )
        await member.follow_neighbours()

    async def _serve_where_needed(self, source: ModelSource, member: SwarmMember) -> None:
        await member.wait_settled(self._serve.settle_s)
        capacity = await trio.to_thread.run_sync(measure_capacity, source.spec, self._compute)
        most = min(capacity.blocks, self._config.num_blocks or capacity.blocks)
        spec = source.spec
        # A node that was killed comes back to what it announced itself, until that expires.
        others = await take_census(member, spec.revision, spec.num_blocks, capacity.tokens_per_s_per_block)
        last = last_span(self._config.data_dir, spec.revision, spec.num_blocks)
        span = choose_span(others, spec.num_blocks, most, capacity.tokens_per_s_per_block, last)
        reason = f"{_fitting(capacity)}; the swarm is weakest here"
        if span == last:
            reason = "served before, and still needed"
        while True:
            span = await self._serve_span(source, member, span, reason, may_move=True)
            reason = "the swarm has come to need these more"

    async def _serve_span(
        self, source: ModelSource, member: SwarmMember, span: BlockSpan, reason: str, *, may_move: bool
    ) -> BlockSpan:
        """Serve `span`; return only if another one should be served instead."""
        self._report(Loading((span.start, span.stop), reason))
        gc.collect()  # cycles of sessions that are over would keep the blocks served before
        runner = await self._loaded(source, span)
        threads, tokens_per_s = await trio.to_thread.run_sync(self._tune, runner)
        ends = None
        if self._serve.ends:
            ends = await trio.to_thread.run_sync(
                load_held_ends, source, span, self._compute, abandon_on_cancel=True
            )
        await self._weights.share(source)
        speed = DecodeSpeed(tokens_per_s)
        worker_opening = open_worker(
            self._serve.max_batch_tokens,
            client_steps=self._serve.client_batch_steps,
            counts=member.host.counts,
        )
        async with worker_opening as worker:
            served = ServedSpan(source.spec, runner, worker, speed, ends=ends)
            offers = await trio.to_thread.run_sync(
                offer_adapters, self._config.adapters, served, member.evidence
            )
            announcer = Announcer(
                member, source.spec, runner, speed, self._serve, has_ends=ends is not None, adapters=offers
            )
            server = SpanServer(
                member.host,
                served,
                self._serve,
                self._report,
                announcer.touch,
                evidence=member.evidence,
                find_addrs=lambda peer, client: member.addresses_of(peer, source.spec.revision, client),
            )
            announcer.free_tokens = lambda: server.free_tokens
            server.register()
            training = TrainServer(member.host, served, self._serve)
            training.register()
            if self._metrics is not None:
                _watch_span(self._metrics, server, runner, worker)
            async with self._announced(announcer, server, training):
                remember_span(self._config.data_dir, source.spec.revision, span)
                self._report(ready(member, source.spec, runner, tokens_per_s, self._relay))
                async with open_nursery() as nursery:
                    nursery.start_soon(announcer.keep_fresh)
                    tuner = Tuner(
                        runner,
                        worker,
                        speed,
                        lambda: not (server.sessions or training.sessions),
                        threads=threads,
                        cores=self._cores(runner),
                    )
                    nursery.start_soon(tuner.keep_right, announcer.touch)
                    return await self._until_needed_elsewhere(
                        source.spec, member, announcer, (server, training), may_move
                    )

    @asynccontextmanager
    async def _announced(
        self, announcer: Announcer, server: SpanServer, training: TrainServer
    ) -> AsyncGenerator[None]:
        """Announce a span; withdraw it when the block ends, after which no session is open.

        A block that ends without an error leaves for another span, which it does when nobody is served. Any
        other end is the node's own, and sessions are given their time to end.
        """
        moving = False
        try:
            await announcer.announce()
            yield
            moving = True
        finally:
            server.refuse_newcomers()
            training.refuse_newcomers()
            with trio.CancelScope(shield=True):
                with trio.move_on_after(self._serve.leave_timeout_s):
                    await announcer.withdraw()
                if not moving:
                    self._report(NodeLeaving(server.sessions))
                    await server.drain(self._serve.drain_s)
            # The host would keep the server, and with it the blocks, while the next ones are loaded.
            server.unregister()
            training.unregister()

    async def _until_needed_elsewhere(
        self,
        spec: ModelSpec,
        member: SwarmMember,
        announcer: Announcer,
        servers: tuple[SpanServer, TrainServer],
        may_move: bool,
    ) -> BlockSpan:
        if not may_move:
            await trio.sleep_forever()
        since = trio.current_time()
        while True:
            # At times of its own: two nodes that looked at the same moment could make the same move.
            await trio.sleep(self._serve.announce_interval_s * random.uniform(0.5, 1.5))
            dwelt_s = trio.current_time() - since
            own = announcer.announcement()
            others: list[Announcement] = []
            if dwelt_s >= PlacementConfig().min_dwell_s:  # before that it stays anyway, and calls on nobody
                speed = own.tokens_per_s * len(own.span)
                others = await take_census(member, spec.revision, spec.num_blocks, speed)
            better = should_move(own, others, spec.num_blocks, dwelt_s)
            if better is not None and not any(each.sessions for each in servers):
                for each in servers:
                    each.refuse_newcomers()  # at once: the next one could come while we leave
                return better

    def _resolve(self) -> ModelSource:
        config = self._config
        return resolve_model(
            config.model,
            cache_dir=config.cache_dir,
            weights_bytes=config.weights_bytes,
            progress=self._progress,
        )

    async def _loaded(self, source: ModelSource, span: BlockSpan) -> SpanRunner:
        """The span, with weights from peers nearby, the hub, or peers anywhere, in this order."""
        load = partial(trio.to_thread.run_sync, self._load, source, span, abandon_on_cancel=True)
        await self._weights.bring(source, span)
        try:
            return await load()
        except ModelNotFound as exc:
            if not self._weights_config.take:
                raise
            logger.warning("%s; asking peers for the weights", exc)
            await self._weights.bring_in_place_of_the_hub(source, span)
            return await load()

    def _load(self, source: ModelSource, span: BlockSpan) -> SpanRunner:
        checkpoint = source.fetch(span, embedding_and_head=False, progress=self._progress)
        devices = [target.device for target in choose_targets(self._compute, checkpoint.spec.dtype)]
        with refusals_named(f"blocks {span}", devices, _FEWER_BLOCKS):
            return open_runner(checkpoint, span, self._compute, progress=self._progress)

    def _cores(self, runner: SpanRunner) -> int:
        """Number of threads that may be tried: one if it was set, or does not matter."""
        if self._compute.threads or all(device.type != "cpu" for device in runner.devices):
            return 1
        return usable_cores()

    def _tune(self, runner: SpanRunner) -> tuple[int, float]:
        """The number of threads to compute with, and the tokens per second with it."""
        # The first steps take memory too: a card's libraries allocate theirs when they are first used.
        with refusals_named(f"a step through blocks {runner.span}", runner.devices, _FEWER_BLOCKS):
            if (cores := self._cores(runner)) > 1:
                return find_threads(runner, cores)
            return runner.threads, measure_speed(runner)

    def _wanted_blocks(self, spec: ModelSpec) -> BlockSpan | None:
        if self._config.blocks is None:
            return None
        span = BlockSpan.parse(self._config.blocks)
        if span.stop > spec.num_blocks:
            raise SpanOutOfRange(
                f"{spec.model} has {spec.num_blocks} blocks, 0:{spec.num_blocks}; {span} is not among them"
            )
        return span


def _fitting(capacity: Capacity) -> str:
    """Number of blocks that fit, and into what if a limit was reckoned with."""
    limited = f", since {capacity.memory}" if capacity.memory.limited_by else ""
    return f"{capacity.blocks} blocks fit{limited}"


def _watch_span(metrics: Metrics, server: SpanServer, runner: SpanRunner, worker: Worker) -> None:
    """Show what serving a span is about; of the span served last."""
    cache = runner.cache
    metrics.watch("sessions", "Open sessions.", lambda: server.sessions)
    metrics.watch("queue_steps", "Steps that wait to be computed.", lambda: worker.queued)
    metrics.watch("cache_tokens", "Tokens that the KV cache has room for.", lambda: cache.capacity_tokens)
    metrics.watch("cache_free_tokens", "Of them, those not reserved.", lambda: cache.free_tokens)
    metrics.watch("replay_bytes", "Reserved for replay logs.", lambda: server.replay_bytes)
