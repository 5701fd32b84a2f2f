"""Hops of the bundled model in memory, a trainer over them, and what one pass over all blocks gives."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import trio
from torch import Tensor

from p2pinfer.errors import NoRoute, PeerError
from p2pinfer.learning.swarm_trainer import Batch, SwarmTrainer, open_trainer
from p2pinfer.learning.trained_adapter import AdapterGradient, ModelAdapter
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.blocks import load_blocks
from p2pinfer.models.compute.target import Target
from p2pinfer.models.learning.adapter import (
    PREFIX,
    PROJECTIONS,
    Adapter,
    AdapterLayout,
    Factors,
    LowRank,
    projection_shape,
)
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import Microbatch, SpanPasses, complete
from p2pinfer.models.numerics import FLOAT32, Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.failover import Gap

from ..node.memory_swarm import MemorySwarm, open_memory_swarm

BLOCKS = BlockSpan(0, 8)
WAY = {"a": (0, 3), "b": (3, 5), "c": (5, 8)}
OTHERS = {"d": (0, 4), "e": (2, 6), "f": (4, 8)}
LENGTHS = [7, 7, 3, 11, 1]
PROMPT_TOKENS = 2


@dataclass(frozen=True)
class Plan:
    route: Route
    codec: Codec


@dataclass
class Peers:
    """Routes over those who serve, the first of them by name first."""

    spans: dict[str, tuple[int, int]]
    codec: Codec = "float32"
    failed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    async def plan_session(self, tokens: int, excluded: frozenset[str]) -> Plan:
        await trio.lowlevel.checkpoint()
        return Plan(self._over(BLOCKS, excluded), self.codec)

    async def find_replacement(self, gap: Gap) -> Route:
        await trio.lowlevel.checkpoint()
        return self._over(gap.span, gap.excluded)

    def hop_failed(self, route: Route, error: PeerError) -> None:
        self.failed.append((route.hops[0].peer_id, str(error)))

    def _over(self, span: BlockSpan, excluded: frozenset[str]) -> Route:
        hops: list[Hop] = []
        block = span.start
        for peer_id, (start, stop) in self.spans.items():
            if start <= block < stop and block < span.stop and peer_id not in excluded:
                hops.append(Hop(peer_id, BlockSpan(block, min(stop, span.stop))))
                block = hops[-1].span.stop
        if block < span.stop:
            raise NoRoute("nobody is left", [(block, span.stop)])
        return Route(tuple(hops))


@dataclass(frozen=True)
class Task:
    """A batch and an adapter with the results that one machine gets."""

    batch: Batch
    adapter: ModelAdapter
    gradient: Tensor
    output: Tensor
    of_hidden: Tensor
    of_adapter: Tensor

    def vector(self, gradient: AdapterGradient) -> Tensor:
        assert gradient.prompts is not None
        return torch.cat([*(each.flatten() for each in gradient.tensors), gradient.prompts.flatten()])


def make_task(checkpoint: Checkpoint, *, dropout: float = 0.0, seed: int = 0) -> Task:
    torch.manual_seed(1)
    blocks = load_blocks(checkpoint, BLOCKS, Target(torch.device("cpu"), FLOAT32))
    updates = [LowRank(block, name, 2, 0.5, dropout) for block in (0, 3, 4, 7) for name in PROJECTIONS]
    shapes = [projection_shape(blocks.architecture, each.projection) for each in updates]
    factors = [
        Factors(torch.randn(2, inputs) * 0.1, torch.randn(outputs, 2) * 0.1) for inputs, outputs in shapes
    ]
    width = blocks.architecture.kv_heads * blocks.architecture.head_dim
    for block in (1, 4):
        updates.append(LowRank(block, PREFIX, 3, 1.0))
        factors.append(Factors(torch.randn(3, width), torch.randn(width, 3)))
    prompts = torch.randn(8, PROMPT_TOKENS, checkpoint.spec.hidden_size) * 0.1
    tokens = sum(LENGTHS)
    order = torch.cat([torch.arange(length) for length in LENGTHS])
    batch = Batch(Rows(LENGTHS, order, order), torch.randn(tokens, checkpoint.spec.hidden_size) * 0.1)
    gradient = torch.randn(tokens, checkpoint.spec.hidden_size)
    flat = torch.cat([*(each.flatten() for pair in factors for each in pair), prompts.flatten()])
    layout = AdapterLayout(tuple(updates), PROMPT_TOKENS)
    passes = SpanPasses(blocks)
    work = Microbatch(BLOCKS, batch.rows, Adapter(layout, flat, blocks.architecture, BLOCKS), seed)
    forwarded = complete(passes.forward(work, batch.hidden))
    gradients = complete(passes.backward(work, forwarded.inputs, gradient))
    assert gradients.hidden is not None and gradients.adapter is not None
    return Task(
        batch,
        ModelAdapter(updates, factors, prompts),
        gradient,
        forwarded.output,
        gradients.hidden,
        gradients.adapter,
    )


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Within so much of the largest value."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@asynccontextmanager
async def open_training(
    checkpoint: Checkpoint, peers: Peers, *, wait_s: float = 0.0, **options: Any
) -> AsyncGenerator[tuple[SwarmTrainer, MemorySwarm]]:
    """A swarm in which `peers` serve, and a trainer."""
    async with open_memory_swarm(checkpoint) as swarm:
        for peer_id, span in peers.spans.items():
            await swarm.serve(peer_id, *span, **options)
        host = swarm.network.host("client")
        async with open_trainer(host, swarm.spec, peers, trio.Event, wait_s) as trainer:
            yield trainer, swarm
