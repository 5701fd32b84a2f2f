"""Who shows no sign of life while a step waits, and who is only busy."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import trio
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint

from ..node.memory_swarm import open_memory_swarm, route_over
from ..spares import CHUNKS, OTHERS, PROMPT, WAY, Spares, close_to, decode_rest, running, serve


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[None]:
    """Have an entry for every call of a method of `owner`."""
    calls: list[None] = []
    method = getattr(owner, name)

    def counted(*args: Any, **named: Any) -> Any:
        calls.append(None)
        return method(*args, **named)

    monkeypatch.setattr(owner, name, counted)
    return calls


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
