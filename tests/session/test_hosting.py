"""A bug in one session of a client ends that session, and no other."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.protocol.messages import Open, Opened, Result
from p2pinfer.routing.route import Route
from p2pinfer.session.hop_stream import HopStream
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session

from ..node.memory_swarm import MemorySwarm, open_memory_swarm, route_over
from ..spares import PROMPT, close_to

ROUTE = route_over(a=(0, 4), b=(4, 8))


@pytest.fixture
async def swarm(checkpoint: Checkpoint) -> AsyncGenerator[MemorySwarm]:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 4)
        await swarm.serve("b", 4, 8)
        yield swarm


async def start(
    swarm: MemorySwarm, nursery: trio.Nursery, ended: list[Session], route: Route = ROUTE
) -> Session:
    opening = open_session(
        swarm.network.host("client"),
        route,
        swarm.spec,
        max_tokens=64,
        codec="float32",
        config=SessionConfig(chunk_tokens=8),
    )
    return await start_session(nursery, opening, on_closed=ended.append)


def with_a_bug(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_it(stream: HopStream, result: Result, payload: bytearray) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(session, "on_result", raise_it)


@pytest.mark.parametrize("dtype", ["bfloat16_float32", "no_such_dtype", "\x1b[2J", ""])
async def test_a_hop_that_opens_in_what_cannot_be_checked_is_left_at_once(
    swarm: MemorySwarm, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it has announced, and without a word of its own."""
    server = swarm.served["b"].server

    def opened(opening: Open, prefix: int) -> Opened:
        return Opened(dtype, prefix=prefix)

    monkeypatch.setattr(server, "_opened", opened)
    async with trio.open_nursery() as nursery:
        with pytest.raises(
            ProtocolViolation, match=r"computes in a format that cannot be audited here"
        ) as told:
            await start(swarm, nursery, [])
    assert told.value.peer_id == "b"
    await swarm.all_closed()


async def test_a_hop_that_opens_in_other_numerics_than_it_has_announced_is_left_at_once(
    swarm: MemorySwarm,
) -> None:
    """An audit would hold it to what it opens in: nf4 in place of the bfloat16 that it was chosen for."""
    announced = dict.fromkeys("abc", "float32") | {"b": "bfloat16"}
    route = Route(tuple(replace(hop, dtype=announced[hop.peer_id]) for hop in ROUTE.hops))
    async with trio.open_nursery() as nursery:
        with pytest.raises(
            ProtocolViolation, match="computes in float32, and has announced bfloat16"
        ) as told:
            await start(swarm, nursery, [], route)
    assert told.value.peer_id == "b"
    await swarm.all_closed()


async def test_the_others_go_on_with_the_right_output(
    swarm: MemorySwarm, inputs: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Session] = []
    async with trio.open_nursery() as nursery:
        sessions = [await start(swarm, nursery, ended) for _ in range(3)]
        close_to(await sessions[0].prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
        with_a_bug(sessions[1], monkeypatch)
        outputs: list[Tensor] = []

        async def go_on() -> None:
            for position in range(PROMPT, len(inputs)):
                outputs.append(await sessions[0].decode(inputs[position : position + 1], position))

        nursery.start_soon(go_on)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await sessions[1].prefill(inputs[:PROMPT], 0)
        assert ended == [sessions[1]]
        close_to(await sessions[2].prefill(inputs, 0), expected[-1:])
        while len(outputs) < len(inputs) - PROMPT:
            await trio.testing.wait_all_tasks_blocked(0.01)
        close_to(torch.cat(outputs), expected[PROMPT:])
        for session in sessions:
            await session.aclose()
    await swarm.all_closed()


async def test_a_session_that_broke_says_so_again_and_closes_quietly(
    swarm: MemorySwarm, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as nursery:
        session = await start(swarm, nursery, [])
        with_a_bug(session, monkeypatch)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await session.decode(inputs[:1], 0)
        await session.aclose()
        await session.aclose()
    await swarm.all_closed()


async def test_a_closed_session_takes_no_steps(swarm: MemorySwarm, inputs: Tensor) -> None:
    ended: list[Session] = []
    async with trio.open_nursery() as nursery:
        session = await start(swarm, nursery, ended)
        pending = await session.submit(inputs[:4], 0)
        await session.aclose()
        assert ended == [session]
        with pytest.raises(PeerVanished, match="closed"):
            await session.decode(inputs[4:5], 4)
        with pytest.raises(PeerVanished, match="closed"):
            await pending
    await swarm.all_closed()


async def test_a_session_in_a_block_ends_with_it(swarm: MemorySwarm, inputs: Tensor) -> None:
    opening = open_session(
        swarm.network.host("client"),
        ROUTE,
        swarm.spec,
        max_tokens=64,
        codec="float32",
        config=SessionConfig(),
    )
    with pytest.raises(KeyError, match="the user's own"):
        async with opening as session:
            await session.decode(inputs[:4], 0)
            raise KeyError("the user's own")
    await swarm.all_closed()
