"""Sessions over real blocks, and others who can take over from their hops."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import torch
import trio
from torch import Tensor

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import NoRoute, PeerError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.failover import Gap
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session

from .node.memory_swarm import FLOAT32, MemorySwarm

PROMPT, TOTAL = 20, 32
# Nobody counts as slow or silent for want of a processor.
CHUNKS = SessionConfig(chunk_tokens=6, chunks_in_flight=3, slow_step_s=60.0, probe_timeout_s=15.0)
WAY = {"a": (0, 3), "b": (3, 5), "c": (5, 8)}
OTHERS = {"d": (0, 4), "e": (2, 6), "f": (4, 8)}


class Spares:
    """Names replacements: the first of those it was given, by span, that is not excluded."""

    def __init__(self, **spans: tuple[int, int]) -> None:
        self.spans = spans
        self.gaps: list[Gap] = []
        self.failed: list[str] = []
        self.slow: list[tuple[str, float]] = []
        self.bettered: set[str] = set()  # hops for which it has somebody better
        self.before_answering: Callable[[], Awaitable[None]] | None = None

    async def find_replacement(self, gap: Gap) -> Route:
        self.gaps.append(gap)
        await trio.lowlevel.checkpoint()
        if self.before_answering is not None:
            await self.before_answering()
        hops: list[Hop] = []
        block = gap.span.start
        for peer_id, (start, stop) in self.spans.items():
            if start <= block < stop and block < gap.span.stop and peer_id not in gap.excluded:
                hops.append(Hop(peer_id, BlockSpan(block, min(stop, gap.span.stop))))
                block = hops[-1].span.stop
        if block < gap.span.stop:
            raise NoRoute("nobody is left", [(block, gap.span.stop)])
        return Route(tuple(hops))

    async def find_faster(self, gap: Gap, hop: Hop, seconds: float) -> Route | None:
        await trio.lowlevel.checkpoint()
        self.slow.append((hop.peer_id, seconds))
        return await self.find_replacement(gap) if hop.peer_id in self.bettered else None

    def hop_failed(self, route: Route, error: PeerError) -> None:
        assert error.peer_id in route.peer_ids
        self.failed.append(error.peer_id)


@asynccontextmanager
async def running(
    swarm: MemorySwarm,
    route: Route,
    spares: Spares,
    inputs: Tensor | None,
    config: SessionConfig = CHUNKS,
) -> AsyncGenerator[Session]:
    """A session that remembers what went in, unless that is None; at the end nothing of it may be left."""
    session = await start_session(
        swarm.network.nursery,
        open_session(
            swarm.network.host("client"),
            route,
            swarm.spec,
            max_tokens=TOTAL,
            codec="float32",
            config=config,
            replay_source=None if inputs is None else (lambda start, stop: inputs[start:stop]),
            replanner=spares,
        ),
    )
    yield session
    await session.aclose()
    await swarm.all_closed()


async def serve(swarm: MemorySwarm, **spans: tuple[int, int]) -> None:
    for peer_id, span in spans.items():
        await swarm.serve(peer_id, *span)


def hidden_states() -> Tensor:
    """What goes in at `TOTAL` positions."""
    return torch.randn(TOTAL, 320, generator=torch.Generator().manual_seed(0)) * 0.1


def on_one_machine(checkpoint: Checkpoint, inputs: Tensor) -> Tensor:
    """What one machine gives."""
    runner = open_runner(checkpoint, BlockSpan(0, 8), FLOAT32)
    return runner.run([Chunk(runner.cache.reserve(TOTAL), 0, inputs)])[0]


def close_to(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=1e-4)


async def decode_rest(
    session: Session, inputs: Tensor, expected: Tensor, start: int = PROMPT, stop: int = TOTAL
) -> None:
    for position in range(start, stop):
        output = await session.decode(inputs[position : position + 1], position)
        close_to(output, expected[position : position + 1])
