"""Several steps of a session in flight at once, some of which turn out to be wrong."""

from __future__ import annotations

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.protocol.messages import Result
from p2pinfer.session.hop_stream import HopStream
from p2pinfer.session.pending import Superseded

from ..node.memory_swarm import open_memory_swarm, route_over
from ..spares import OTHERS, PROMPT, WAY, Spares, close_to, running, serve


def wrong(tokens: int) -> Tensor:
    return torch.randn(tokens, 320, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
async def test_what_follows_a_roll_back_is_as_if_what_was_rolled_back_had_not_been(
    accepted: int, checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    """Windows of three tokens, of which the first few are right: then the truth goes on from there."""
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY)
        async with running(swarm, route_over(**WAY), Spares(), inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            position = PROMPT
            while position + 7 <= len(inputs):
                guessed = torch.cat([inputs[position : position + accepted], wrong(3 - accepted)])
                first = await session.submit(guessed, position)
                later = [await session.submit(wrong(2), position + 3 + 2 * index) for index in range(2)]
                close_to((await first)[:accepted], expected[position : position + accepted])
                position += accepted
                await session.roll_back(position)
                for each in later:
                    with pytest.raises(Superseded):
                        await each
                output = await session.decode(inputs[position : position + 1], position)
                close_to(output, expected[position : position + 1])
                position += 1
            assert session.failovers == 0
            assert await session.settle() is None  # every receipt fits, those that were dropped left out


@pytest.mark.parametrize("victim", ["a", "b", "c"])
async def test_a_hop_that_dies_in_the_middle_of_a_window_is_replaced_and_the_window_sent_again(
    victim: str, checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        async with running(swarm, route_over(**WAY), Spares(**OTHERS), inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            windows = [await session.submit(inputs[at : at + 3], at) for at in range(PROMPT, PROMPT + 9, 3)]
            await swarm.network.kill(victim)
            for index, pending in enumerate(windows):
                at = PROMPT + 3 * index
                close_to(await pending, expected[at : at + 3])
                close_to(await pending, expected[at : at + 3])  # as often as it is wanted
            assert session.failovers == 1
            assert victim in session.failed_peers


@pytest.mark.parametrize("victim", ["a", "b"])
async def test_a_result_that_comes_while_a_hop_is_replaced_leaves_no_gap(
    victim: str, checkpoint: Checkpoint, inputs: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hops behind it go on with what it passed on; its replacement is fed up to a step without a result."""
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        spares = Spares(**OTHERS)
        async with running(swarm, route_over(**WAY), spares, inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            on_their_way: list[tuple[HopStream, Result, bytearray]] = []
            has_come, take = trio.Event(), session.on_result

            def hold(stream: HopStream, result: Result, payload: bytearray) -> None:
                on_their_way.append((stream, result, bytearray(payload)))
                has_come.set()

            async def arrive() -> None:
                await trio.lowlevel.checkpoint()
                monkeypatch.setattr(session, "on_result", take)
                take(*on_their_way[0])

            monkeypatch.setattr(session, "on_result", hold)
            spares.before_answering = arrive
            windows = [await session.submit(inputs[at : at + 3], at) for at in range(PROMPT, PROMPT + 9, 3)]
            await has_come.wait()
            await swarm.network.kill(victim)
            for index, pending in enumerate(windows):
                at = PROMPT + 3 * index
                close_to(await pending, expected[at : at + 3])
            assert session.failovers == 1


async def test_a_hop_is_handed_over_between_windows(
    checkpoint: Checkpoint, inputs: Tensor, expected: Tensor
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, d=WAY["b"])
        async with running(swarm, route_over(**WAY), Spares(d=WAY["b"]), inputs) as session:
            close_to(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
            windows = [await session.submit(inputs[at : at + 2], at) for at in range(PROMPT, PROMPT + 6, 2)]
            await session.handovers.replace("b")
            assert session.route.peer_ids == ("a", "d", "c")
            windows.append(await session.submit(inputs[PROMPT + 6 :], PROMPT + 6))
            outputs = torch.cat([await pending for pending in windows])
            close_to(outputs, expected[PROMPT:])
            assert (session.failovers, session.handovers.done) == (0, 1)
