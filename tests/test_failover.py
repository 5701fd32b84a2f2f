"""Hops that die, stall, lie or leave while a session runs, over real blocks: what comes out is the same."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.chain import Spare
from p2pinfer.errors import NoRoute, PeerError
from p2pinfer.failover import Gap
from p2pinfer.models.cache import CacheLease
from p2pinfer.models.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.runner import Chunk, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session import Session, SessionConfig, open_session
from p2pinfer.slowness import Slowness

from .node.memory_swarm import FLOAT32, MemorySwarm, open_memory_swarm, route_over

PROMPT, TOTAL = 20, 32
# Nobody counts as slow or silent for want of a processor.
CHUNKS = SessionConfig(chunk_tokens=6, chunks_in_flight=3, slow_step_s=60.0, probe_timeout_s=15.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_stories: Path) -> Checkpoint:
    return open_checkpoint(tiny_stories, "tiny-stories")


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(TOTAL, 320, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint, inputs: Tensor) -> Tensor:
    """What one machine gives."""
    runner = open_runner(checkpoint, BlockSpan(0, 8), FLOAT32)
    return runner.run([Chunk(runner.cache.reserve(TOTAL), 0, inputs)])[0]


class Spares:
    """Names replacements: the first of those it was given, by span, that is not excluded."""

    def __init__(self, **spans: tuple[int, int]) -> None:
        self.spans = spans
        self.gaps: list[Gap] = []
        self.failed: list[str] = []
        self.slow: list[tuple[str, float]] = []
        self.bettered: set[str] = set()  # hops for which it has somebody better
        self.before_answering: Callable[[], Awaitable[None]] | None = None

    async def replacement(self, gap: Gap) -> Route:
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

    async def better(self, gap: Gap, hop: Hop, seconds: float) -> Route | None:
        await trio.lowlevel.checkpoint()
        self.slow.append((hop.peer_id, seconds))
        return await self.replacement(gap) if hop.peer_id in self.bettered else None

    def hop_failed(self, route: Route, error: PeerError) -> None:
        assert error.peer_id in route.peer_ids
        self.failed.append(error.peer_id)


@asynccontextmanager
async def running(
    swarm: MemorySwarm,
    route: Route,
    spares: Spares,
    inputs: Tensor,
    config: SessionConfig = CHUNKS,
) -> AsyncGenerator[Session]:
    """A session that remembers what went in; at the end nothing of it may be left anywhere."""
    session = await open_session(
        swarm.network.host("client"),
        swarm.network.nursery,
        route,
        swarm.spec,
        max_tokens=TOTAL,
        codec="float32",
        config=config,
        replanner=spares,
    )
    session.recall = lambda start, stop: inputs[start:stop]
    yield session
    await session.aclose()
    await swarm.all_closed()


async def serve(swarm: MemorySwarm, **spans: tuple[int, int]) -> None:
    for peer_id, span in spans.items():
        await swarm.serve(peer_id, *span)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[None]:
    """Have an entry for every call of a method of `owner`."""
    calls: list[None] = []
    method = getattr(owner, name)

    def counted(*args: Any) -> Any:
        calls.append(None)
        return method(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


def close_to(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=1e-4)


async def decode_rest(
    session: Session, inputs: Tensor, expected: Tensor, start: int = PROMPT, stop: int = TOTAL
) -> None:
    for position in range(start, stop):
        output = await session.decode(inputs[position : position + 1], position)
        close_to(output, expected[position : position + 1])


WAY = {"a": (0, 3), "b": (3, 5), "c": (5, 8)}
OTHERS = {"d": (0, 4), "e": (2, 6), "f": (4, 8)}


@pytest.mark.parametrize("victims", ["a", "b", "c", "ab", "bc", "ac", "abc"])
@pytest.mark.parametrize("moment", ["at prefill", "between steps", "inside a step"])
async def test_whoever_dies_whenever_the_outputs_are_those_of_one_machine(
    victims: str, moment: str, checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        spares = Spares(**OTHERS)

        async def kill() -> None:
            for victim in victims:
                await swarm.network.kill(victim)

        async with running(swarm, route_over(**WAY), spares, inputs) as session:
            if moment == "at prefill":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(kill)
                    close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            else:
                close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
                if moment == "between steps":
                    await kill()
                else:
                    swarm.network.nursery.start_soon(kill)
            await decode_rest(session, inputs, expected)
            assert session.failovers >= 1
            assert not set(victims) & set(session.route.peer_ids)
            assert set(spares.failed) == set(victims) == session.failed_peers


async def test_a_hop_that_has_become_slow_works_until_a_better_one_is_warm(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    config = replace(CHUNKS, slow_step_s=1e-9)  # any hop will do
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        spares = Spares(**OTHERS)
        async with running(swarm, route_over(**WAY), spares, inputs, config) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            spares.bettered = set(WAY)
            while not session.handovers:
                await decode_rest(session, inputs, expected)
            await decode_rest(session, inputs, expected)
            slow, seconds = spares.slow[0]  # a busy machine leaves time for more
            assert seconds > 0
            assert slow not in session.route.peer_ids
            assert (session.failovers, spares.failed) == (0, [])
            assert len(session.timings) < 2 * (TOTAL - PROMPT)  # those of other hops are gone


async def test_a_slow_hop_stays_where_nobody_is_better(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CHUNKS, slow_step_s=1e-9)
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY)
        spares = Spares()
        async with running(swarm, route_over(**WAY), spares, inputs, config) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            await decode_rest(session, inputs, expected)
            spares.bettered = set(WAY)  # who turn out not to be there
            monkeypatch.setattr(session, "_slowness", Slowness(1e-9))  # it would look again after a while
            await decode_rest(session, inputs, expected)
            assert (session.handovers, session.route) == (0, route_over(**WAY))
            assert len(spares.slow) == 2


async def test_hops_that_leave_together_are_replaced_one_after_the_other(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        spares = Spares(d=(0, 3), e=(3, 5), f=(5, 8))
        await serve(swarm, **WAY, **spares.spans)
        async with running(swarm, route_over(**WAY), spares, inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            async with trio.open_nursery() as nursery:
                for peer_id in WAY:
                    nursery.start_soon(swarm.served[peer_id].server.drain, 30.0)
                while session.handovers < 3:
                    await decode_rest(session, inputs, expected)
            await decode_rest(session, inputs, expected)
            assert not set(WAY) & set(session.route.peer_ids)
            assert session.failovers == 0


async def test_who_refuses_to_take_over_from_a_hop_that_leaves_is_not_the_last_to_be_asked(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY)
        leases: list[CacheLease] = []
        for full in "de":
            cache = (await swarm.serve(full, 3, 5)).runner.cache
            leases.append(cache.reserve(cache.free_tokens))
        await serve(swarm, f=(3, 5))
        spares = Spares(d=(3, 5), e=(3, 5), f=(3, 5))
        async with running(swarm, route_over(**WAY), spares, inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(swarm.served["b"].server.drain, 30.0)
                while not session.handovers:
                    await decode_rest(session, inputs, expected)
            assert session.route.peer_ids == ("a", "f", "c")
            assert (session.failovers, spares.failed) == (0, ["d", "e"])
            for lease in leases:
                lease.release()


@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_who_shows_no_sign_of_life_while_a_step_waits_is_replaced(
    victim: str, checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    """As a frozen process does: its streams stay, and nothing comes or goes on them."""
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        config = replace(CHUNKS, probe_after_s=0.05, probe_timeout_s=1.0)
        async with running(swarm, route_over(**WAY), Spares(**OTHERS), inputs, config) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            swarm.network.freeze(victim)
            await decode_rest(session, inputs, expected)
            assert victim in session.failed_peers
            swarm.network.thaw(victim)


async def test_a_hop_that_is_busy_is_waited_for(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event loop answers while its device computes; nobody takes it for dead."""
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        runner = swarm.served["b"].runner
        run, may_go = runner.run, threading.Event()

        def slow(*chunks: Any) -> list[Tensor]:
            may_go.wait(30)
            return run(*chunks)

        config = replace(CHUNKS, probe_after_s=0.01, probe_timeout_s=5.0)
        spares = Spares(**OTHERS)
        async with running(swarm, route_over(**WAY), spares, inputs, config) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            probes = count_calls(monkeypatch, session.chain, "probe")
            monkeypatch.setattr(runner, "run", slow)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(decode_rest, session, inputs, expected)
                while len(probes) < 3:
                    await trio.sleep(0.01)
                may_go.set()
            assert (session.failovers, spares.gaps) == (0, [])


async def test_a_broken_edge_is_made_anew_and_nobody_replaced(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        spares = Spares(**OTHERS)
        async with running(swarm, route_over(**WAY), spares, inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            for source, target in ("ab", "bc"):
                await swarm.network.cut(source, target)
                output = await session.decode(inputs[PROMPT : PROMPT + 1], PROMPT)
                close_to(output, expected[PROMPT : PROMPT + 1])
            assert session.route == route_over(**WAY)
            assert (session.failovers, spares.failed) == (2, [])
            await swarm.network.cut("a", "b")  # again: it will not last
            await decode_rest(session, inputs, expected)
            assert session.route.peer_ids == ("a", "d", "e", "c")
            assert spares.failed == ["b"]


@pytest.mark.parametrize("victim", ["b", "c"])
async def test_where_a_log_was_given_up_the_replay_starts_further_up(
    victim: str, checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    short = ServeConfig(replay_bytes_per_session=PROMPT * 1280)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", *WAY["a"], config=short if victim == "b" else None)
        await swarm.serve("b", *WAY["b"], config=short)
        await serve(swarm, c=WAY["c"], **OTHERS)
        async with running(swarm, route_over(**WAY), Spares(**OTHERS), inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            await decode_rest(session, inputs, expected, stop=TOTAL - 2)
            await swarm.network.kill(victim)
            await decode_rest(session, inputs, expected, TOTAL - 2)
            assert session.failovers == 1
            assert session.failed_peers == {victim}


async def test_a_session_whose_past_nobody_knows_ends_with_who_failed(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        async with running(swarm, route_over(**WAY), Spares(**OTHERS), inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            session.recall = None
            await swarm.network.kill("a")
            for _ in range(2):
                with pytest.raises(PeerError) as caught:
                    await session.decode(inputs[PROMPT : PROMPT + 1], PROMPT)
                assert caught.value.peer_id == "a"


async def test_a_replacement_that_dies_while_it_is_fed_is_replaced_too(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, d=(3, 5), e=(3, 5))
        spares = Spares(d=(3, 5), e=(3, 5))
        async with running(swarm, route_over(**WAY), spares, inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            take_over = session.chain.take_over

            async def take_over_and_die(spare: Spare, stop: int) -> None:
                if spare.hops[0].peer_id == "d":
                    await swarm.network.kill("d")
                await take_over(spare, stop)

            monkeypatch.setattr(session.chain, "take_over", take_over_and_die)
            await swarm.network.kill("b")
            await decode_rest(session, inputs, expected)
            assert session.route.peer_ids == ("a", "e", "c")
            assert (session.failovers, spares.failed) == (1, ["b", "d"])


async def test_a_session_without_a_replanner_ends_with_its_hop(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        spares = Spares()
        async with running(swarm, route_over(**WAY), spares, inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            with pytest.raises(ValueError, match="nobody cannot be replaced"):
                await session.replace("nobody")
            with pytest.raises(NoRoute):
                await session.replace("b")
            await swarm.network.kill("b")
            with pytest.raises(PeerError) as caught:
                await decode_rest(session, inputs, expected)
            assert caught.value.peer_id == "b"
            assert isinstance(caught.value.__cause__, NoRoute)
            assert caught.value.__cause__.missing == ((3, 5),)
