"""Hops that leave or have become slow: others take over while the session goes on."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from p2pinfer.errors import NoRoute, PeerError, PeerVanished
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.cache import CacheLease
from p2pinfer.session import handover
from p2pinfer.session.chain import Replacement
from p2pinfer.session.session import Session
from p2pinfer.session.stragglers import Stragglers

from ..node.memory_swarm import open_memory_swarm, route_over
from ..spares import CHUNKS, OTHERS, PROMPT, TOTAL, WAY, Spares, close_to, decode_rest, running, serve


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
            while not session.handovers.done:
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
            monkeypatch.setattr(
                session.handovers, "_stragglers", Stragglers(1e-9)
            )  # it would look again after a while
            await decode_rest(session, inputs, expected)
            assert (session.handovers.done, session.route) == (0, route_over(**WAY))
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
                while session.handovers.done < 3:
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
                while not session.handovers.done:
                    await decode_rest(session, inputs, expected)
            assert session.route.peer_ids == ("a", "f", "c")
            assert (session.failovers, spares.failed) == (0, ["d", "e"])
            for lease in leases:
                lease.release()


async def test_where_nobody_can_take_over_the_session_goes_on_as_it_is(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY)
        async with running(swarm, route_over(**WAY), Spares(), inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            with pytest.raises(ValueError, match="nobody cannot be replaced"):
                await session.handovers.replace("nobody")
            with pytest.raises(NoRoute):
                await session.handovers.replace("b")
            await decode_rest(session, inputs, expected)
            assert session.handovers.done == 0


async def test_who_was_to_take_over_is_let_go_when_a_failure_ends_the_session(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step was given up and the next one rolls it back: neither can be sent again."""
    may_go = threading.Event()
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, d=(3, 5))
        run = swarm.served["c"].runner.run

        def slow(*chunks: Any) -> list[Tensor]:
            may_go.wait(30)
            return run(*chunks)

        async def step(session: Session, position: int, given_up: trio.CancelScope) -> None:
            with given_up:
                await session.decode(inputs[position : position + 1], position)

        async def fail(session: Session) -> None:
            with pytest.raises(PeerError) as caught:
                await session.decode(inputs[PROMPT - 1 : PROMPT], PROMPT - 1)
            assert caught.value.peer_id == "b"

        async def hand_over(session: Session) -> None:
            with pytest.raises(PeerVanished):
                await session.handovers.replace("b")

        async with running(swarm, route_over(**WAY), Spares(d=(3, 5)), inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            monkeypatch.setattr(swarm.served["c"].runner, "run", slow)
            given_up = trio.CancelScope()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(step, session, PROMPT, given_up)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(fail, session)  # each waits for its turn
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(hand_over, session)
                while session.handovers.replacement is None:
                    await trio.sleep(0.01)
                given_up.cancel()
                await swarm.network.kill("b")
            may_go.set()


async def test_positions_that_are_about_to_get_another_content_are_not_taken_for_the_past(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong guesses: the next step rolls them back, and is under way while others are warmed up."""
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        async with running(swarm, route_over(**WAY), Spares(**OTHERS), inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            fill, steps = session.chain.fill, vars(session)["_steps"]
            overlaps: list[bool] = []

            async def watched(replacement: Replacement, stop: int) -> None:
                under_way = [sent.step.position for sent in steps.awaited]
                overlaps.append(bool(under_way) and stop > min(under_way))
                await fill(replacement, stop)

            monkeypatch.setattr(session.chain, "fill", watched)
            monkeypatch.setattr(handover, "_SETTLED_TOKENS", 0)
            guesses = torch.randn(5, inputs.shape[1], generator=torch.Generator().manual_seed(1))
            position = PROMPT
            async with trio.open_nursery() as nursery:
                nursery.start_soon(swarm.served["a"].server.drain, 30.0)
                while not session.handovers.done:
                    hidden = torch.cat([inputs[position : position + 1], guesses])
                    outputs = await session.decode(hidden, position)
                    close_to(outputs[:1], expected[position : position + 1])
                    position = position + 1 if position < TOTAL - 8 else PROMPT
            await decode_rest(session, inputs, expected)
            assert session.failovers == 0
            assert overlaps
            assert not any(overlaps)
