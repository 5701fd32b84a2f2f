"""Who shows no sign of life while a step waits, and who is only busy."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import trio
import trio.testing
from torch import Tensor

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import PeerVanished
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.session.hop_stream import HopStream
from p2pinfer.session.liveness import attended

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


# ---------------------------------------------------------------------- work that hops take part in

CONFIG = SessionConfig()


@dataclass(eq=False)
class Hop:
    """A hop that answers pings until it is silent."""

    peer_id: str
    is_there: bool = True
    lost: trio.Event = field(default_factory=trio.Event)

    async def probe(self, within_s: float, *, ask_successor: bool = True) -> object:
        await trio.sleep(0.01 if self.is_there else within_s)
        return "alive" if self.is_there else None


def hops(*there: bool) -> list[HopStream]:
    return [cast(HopStream, Hop(name, is_there)) for name, is_there in zip("ab", there, strict=True)]


async def work_for(seconds: float) -> None:
    await trio.sleep(seconds)


async def test_work_that_ends_in_time_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    await attended(hops(True, True), lambda: work_for(59.0), CONFIG, 60.0)


async def test_work_that_never_ends_is_the_fault_of_the_first(autojump_clock: trio.testing.MockClock) -> None:
    began_at = trio.current_time()
    with pytest.raises(PeerVanished, match="not fed within 60 s") as caught:
        await attended(hops(True, True), trio.sleep_forever, CONFIG, 60.0)
    assert caught.value.peer_id == "a"
    assert trio.current_time() - began_at == pytest.approx(60.0)


async def test_a_hop_that_falls_silent_is_at_fault_whatever_the_limit(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(PeerVanished, match="does not answer pings") as caught:
        await attended(hops(True, False), trio.sleep_forever, CONFIG, 60.0)
    assert caught.value.peer_id == "b"


async def test_what_the_work_raises_comes_first(autojump_clock: trio.testing.MockClock) -> None:
    async def fail() -> None:
        raise PeerVanished("the stream ended", "b")

    with pytest.raises(PeerVanished, match="the stream ended"):
        await attended(hops(True, True), fail, CONFIG, 60.0)
