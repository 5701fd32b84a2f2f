"""Hops of a client's session in tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import torch
from torch import Tensor

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import (
    PeerVanished,
)
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import (
    SESSION_PROTOCOL,
    End,
    Open,
    Opened,
    Refused,
    Result,
)
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.routing.route import Route
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session

from ..node.memory import MemoryNetwork
from ..node.memory_swarm import MemorySwarm, open_memory_swarm, route_over

Script = Callable[[FrameStream], Awaitable[None]]


def hidden_states(tokens: int) -> Tensor:
    return torch.randn(tokens, 320, generator=torch.Generator().manual_seed(0)) * 0.1


async def open_over(
    swarm: MemorySwarm, route: Route, config: SessionConfig | None = None, max_tokens: int = 64
) -> Session:
    return await start_session(
        swarm.network.nursery,
        open_session(
            swarm.network.host("client"),
            route,
            swarm.spec,
            max_tokens=max_tokens,
            codec="float32",
            config=config or SessionConfig(),
            check_receipts=False,  # hops that play a part sign nothing; test_receipt_checks.py checks
        ),
    )


def script(network: MemoryNetwork, peer_id: str, play: Script, *, opened: bool = True) -> list[Open]:
    """A hop that opens a session, plays its part and hangs up; what it was asked is in the list."""
    openings: list[Open] = []

    async def answer(stream: PeerStream) -> None:
        frames = FrameStream(stream, max_payload_bytes=1 << 20, peer_id="client")
        opening, _ = await frames.receive()
        assert isinstance(opening, Open)
        openings.append(opening)
        if opened:
            await frames.send(Opened("float32"))
        await play(frames)

    network.host(peer_id).serve(SESSION_PROTOCOL, answer)
    return openings


async def stay(frames: FrameStream) -> None:
    """Say nothing and listen until the client is gone."""
    try:
        while True:
            await frames.receive()
    except PeerVanished:
        return


def saying(*messages: Result | Refused | End | Opened, payload: bytes = b"") -> Script:
    async def play(frames: FrameStream) -> None:
        for message in messages:
            await frames.send(message, payload if isinstance(message, Result) else b"")
        await stay(frames)

    return play


@asynccontextmanager
async def one_hop(checkpoint: Checkpoint, play: Script) -> AsyncGenerator[Session]:
    """A session on a single hop that plays a part."""
    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", play)
        session = await open_over(swarm, route_over(a=(0, 8)))
        yield session
        await session.aclose()


ROW = bytes(1280)
