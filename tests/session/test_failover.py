"""Hops that die or lie while a session runs, over real blocks: what comes out is the same."""

from __future__ import annotations

import pytest
import trio
from torch import Tensor

from p2pinfer.errors import NoRoute, PeerError
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.config import ServeConfig
from p2pinfer.session.chain import Replacement

from ..node.memory_swarm import open_memory_swarm, route_over
from ..spares import OTHERS, PROMPT, TOTAL, WAY, Spares, close_to, decode_rest, running, serve


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
        async with running(swarm, route_over(**WAY), Spares(**OTHERS), None) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
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

            async def take_over_and_die(spare: Replacement, stop: int) -> None:
                if spare.hops[0].peer_id == "d":
                    await swarm.network.kill("d")
                await take_over(spare, stop)

            monkeypatch.setattr(session.chain, "take_over", take_over_and_die)
            await swarm.network.kill("b")
            await decode_rest(session, inputs, expected)
            assert session.route.peer_ids == ("a", "e", "c")
            assert (session.failovers, spares.failed) == (1, ["b", "d"])


async def test_a_replacement_that_lives_and_is_never_fed_is_given_up(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers pings, and nobody says that anything is wrong; the steps that wait would wait for ever."""
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, d=(3, 5), e=(3, 5))
        spares = Spares(d=(3, 5), e=(3, 5))
        async with running(swarm, route_over(**WAY), spares, inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            chain, take_over = session.chain, session.chain.take_over

            async def stop_there(spare: Replacement, stop: int) -> None:
                if spare.hops[0].peer_id == "d":
                    await trio.sleep_forever()
                await take_over(spare, stop)

            def limit_s(spare: Replacement, stop: int) -> float:
                return 0.05 if spare.hops[0].peer_id == "d" else 60.0

            monkeypatch.setattr(chain, "take_over", stop_there)
            monkeypatch.setattr(chain, "replay_limit_s", limit_s)
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
            await swarm.network.kill("b")
            with pytest.raises(PeerError) as caught:
                await decode_rest(session, inputs, expected)
            assert caught.value.peer_id == "b"
            assert isinstance(caught.value.__cause__, NoRoute)
            assert caught.value.__cause__.missing == ((3, 5),)
