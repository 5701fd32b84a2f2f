"""Peers that divide the bundled model among them, and a client that knows them, over memory.

Nobody announces anything: for that there is `memory_swarm`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import msgspec
import torch
import trio
from torch import Tensor

from p2pinfer.client_config import SessionConfig
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import Chunk, SpanRunner, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.events import Event
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import SESSION_PROTOCOL, End, Message, Open, Opened, Refused, Result
from p2pinfer.node.serve.decode_speed import DecodeSpeed
from p2pinfer.node.serve.forward import ServedSpan
from p2pinfer.node.serve.server import SpanServer
from p2pinfer.node.serve.worker import Worker, open_worker
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session

from .memory import MemoryNetwork, MemoryStream
from .memory_swarm import FLOAT32

SESSION = b"s" * 16


class Swarm:
    """Peers "a", "b", ... that each serve a span, and a client's host."""

    def __init__(self, network: MemoryNetwork, checkpoint: Checkpoint, config: ServeConfig) -> None:
        self.network = network
        self.client: Network = network.host("client")
        self.config = config
        self.events: list[Event] = []
        self.route = Route(())
        self.servers: dict[str, SpanServer] = {}
        self.runners: dict[str, SpanRunner] = {}
        self.spec = checkpoint.spec

    async def session(
        self, max_tokens: int = 64, route: Route | None = None, config: SessionConfig | None = None
    ) -> Session:
        return await start_session(
            self.network.nursery,
            open_session(
                self.client,
                route or self.route,
                self.spec,
                max_tokens=max_tokens,
                codec="float32",
                config=config or SessionConfig(),
            ),
        )

    async def frames(
        self, peer: str, protocol: str = SESSION_PROTOCOL, sender: str = "client"
    ) -> FrameStream:
        host = self.network.hosts[sender]
        stream = await host.open_stream(peer, protocol)
        return FrameStream(stream, max_payload_bytes=1 << 22, peer_id=peer)

    def opening(self, peer: str = "a", **changes: object) -> Open:
        span = next(hop.span for hop in self.route.hops if hop.peer_id == peer)
        opening = Open(SESSION, self.spec.revision, span.start, span.stop, 64, "float32")
        return msgspec.structs.replace(opening, **changes)

    async def ask(self, peer: str = "a", **changes: object) -> FrameStream:
        """Ask a peer for a session, frame by frame."""
        frames = await self.frames(peer)
        await frames.send(self.opening(peer, **changes))
        return frames

    def streams(self, source: str, target: str) -> list[MemoryStream]:
        """All that one peer ever opened to another, in order."""
        return [each for *ends, each in self.network.streams if ends == [source, target]]

    async def upgraded(self, times: int, *names: str) -> None:
        """Until these have left so many relays, all together."""
        while sum(self.network.hosts[name].counts.total("upgrades") for name in names) < times:
            await trio.sleep(0.01)

    async def all_closed(self) -> None:
        """Until no session is left and every reservation is back."""
        while any(server.sessions for server in self.servers.values()) or any(
            runner.cache.free_tokens < runner.cache.capacity_tokens for runner in self.runners.values()
        ):
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_swarm(checkpoint: Checkpoint, *cuts: int, **limits: float) -> AsyncGenerator[Swarm]:
    """A swarm whose peers divide the model at `cuts`."""
    config = replace(ServeConfig(), **limits)  # type: ignore[arg-type]
    bounds = [0, *cuts, 8]
    async with trio.open_nursery() as nursery:
        swarm = Swarm(MemoryNetwork(nursery), checkpoint, config)
        hops: list[Hop] = []
        workers: list[AbstractAsyncContextManager[Worker]] = []
        for name, start, stop in zip("abcd", bounds, bounds[1:], strict=False):
            span = BlockSpan(start, stop)
            runner = open_runner(checkpoint, span, FLOAT32)
            worker = open_worker(config.max_batch_tokens)
            workers.append(worker)
            served = ServedSpan(checkpoint.spec, runner, await worker.__aenter__(), DecodeSpeed(100.0))
            server = SpanServer(
                swarm.network.host(name),
                served,
                config,
                swarm.events.append,
                evidence=EvidenceStore(64 << 20, 900),
            )
            server.register()
            swarm.servers[name], swarm.runners[name] = server, runner
            hops.append(Hop(name, span))
        swarm.route = Route(tuple(hops))
        try:
            with trio.fail_after(30):
                yield swarm
        finally:
            nursery.cancel_scope.cancel()
            for opened in workers:
                await opened.__aexit__(None, None, None)


async def refusal(frames: FrameStream) -> Refused:
    """The refusal that ends a stream."""
    message: Message = (await frames.receive())[0]
    while not isinstance(message, Refused):
        assert isinstance(message, Opened | Result)
        message = (await frames.receive())[0]
    assert (await frames.receive())[0] == End()
    return message


def hidden_states(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 320, generator=torch.Generator().manual_seed(seed)) * 0.1


def assert_close(output: Tensor, expected: Tensor) -> None:
    """As close as float32 is, whatever else is in the batch."""
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=1e-4)


def local_output(checkpoint: Checkpoint, hidden: Tensor) -> Tensor:
    """The whole model in one piece, the oracle."""
    runner = open_runner(checkpoint, BlockSpan(0, 8), FLOAT32)
    return runner.run([Chunk(runner.cache.reserve(len(hidden)), 0, hidden)])[0]
