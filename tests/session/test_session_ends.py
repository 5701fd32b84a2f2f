"""A session against hops that vanish, refuse, or say what they should not."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import (
    PeerError,
    PeerRefused,
    PeerUnreachable,
    PeerVanished,
    ProtocolViolation,
    WrongOutput,
)
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import (
    End,
    RefusalCode,
    Refused,
    Result,
)
from p2pinfer.session.opening import refusal_error

from ..node.memory_swarm import open_memory_swarm, route_over
from .hops import ROW, hidden_states, one_hop, open_over, saying, script, stay


async def test_a_result_that_comes_while_the_session_closes_is_nobody_s(checkpoint: Checkpoint) -> None:
    """The reader has been woken, and then the session closes before the reader's turn."""
    hops: list[FrameStream] = []

    async def play(frames: FrameStream) -> None:
        await frames.receive()
        hops.append(frames)
        await trio.sleep_forever()

    async with one_hop(checkpoint, play) as session, trio.open_nursery() as nursery:
        nursery.start_soon(session.decode, hidden_states(1), 0)
        await trio.testing.wait_all_tasks_blocked()
        await hops[0].send(Result(0, 0, 1), ROW)
        nursery.cancel_scope.cancel()
        await session.aclose()


async def test_a_hop_that_vanishes_is_named_at_the_next_step(checkpoint: Checkpoint) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        session = await open_over(swarm, route_over(a=(0, 3), b=(3, 8)))
        await session.prefill(hidden_states(4), 0)
        await swarm.network.kill("b")
        with pytest.raises(PeerVanished) as caught:
            await session.decode(hidden_states(1), 4)
        assert caught.value.peer_id == "b"
        await swarm.network.kill("a")
        with pytest.raises(PeerVanished):
            await session.decode(hidden_states(1), 4)
        await session.aclose()
        await session.aclose()
        await swarm.all_closed()


async def test_a_first_hop_that_is_gone_is_noticed_while_sending(checkpoint: Checkpoint) -> None:
    """Before the reader has had its turn."""
    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", stay)
        session = await open_over(swarm, route_over(a=(0, 8)))
        await swarm.network.kill("a")
        with pytest.raises(PeerVanished) as caught:
            await session.prefill(hidden_states(4), 0)
        assert caught.value.peer_id == "a"
        await session.aclose()


async def test_a_step_that_takes_too_long_counts_as_dead(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", stay)
        session = await open_over(
            swarm, route_over(a=(0, 8)), SessionConfig(step_timeout_s=20, probe_after_s=100)
        )
        with pytest.raises(PeerVanished, match="no answer in 20 s"):
            await session.decode(hidden_states(1), 0)
        assert trio.current_time() >= 20
        await session.aclose()


async def test_a_first_hop_that_takes_nothing_in_counts_as_dead(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def never(self: FrameStream, message: object, payload: object = b"") -> None:
        await trio.sleep_forever()

    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", stay)
        session = await open_over(
            swarm, route_over(a=(0, 8)), SessionConfig(step_timeout_s=20, probe_after_s=100)
        )
        with monkeypatch.context() as patch:
            patch.setattr(FrameStream, "send", never)
            with pytest.raises(PeerVanished, match="it took nothing in for 20 s") as caught:
                await session.decode(hidden_states(1), 0)
        assert caught.value.peer_id == "a"
        await session.aclose()


async def test_a_closed_session_says_so(checkpoint: Checkpoint) -> None:
    async with one_hop(checkpoint, stay) as session, trio.open_nursery() as nursery:

        async def decode() -> None:
            with pytest.raises(PeerVanished, match="the session is closed"):
                await session.decode(hidden_states(1), 0)

        nursery.start_soon(decode)
        await trio.testing.wait_all_tasks_blocked()
        await session.aclose()


@pytest.mark.parametrize(
    ("code", "error", "blamed"),
    [
        ("successor_unreachable", PeerUnreachable, "b"),
        ("successor_vanished", PeerVanished, "b"),
        ("wrong_input", WrongOutput, "b"),
        ("cache_full", PeerRefused, "a"),
        ("protocol", PeerRefused, "b"),
    ],
)
def test_a_refusal_is_blamed_on_the_peer_it_is_about(
    code: RefusalCode, error: type[PeerError], blamed: str
) -> None:
    route = route_over(a=(0, 3), b=(3, 5), c=(5, 8))
    told = refusal_error(Refused(code, "why", "b"), "a", route)
    assert type(told) is error
    assert (str(told), told.peer_id) == ("why", blamed)
    assert told.told_by == ("a" if blamed == "b" else "")  # a's word, and nobody else's
    alone = refusal_error(Refused(code, "why"), "a", route)
    assert (alone.peer_id, alone.told_by) == ("a", "")
    # Nobody is believed about peers that are not beside it on the route, nor about the client.
    assert refusal_error(Refused(code, "why", "c"), "a", route).peer_id == "a"
    assert refusal_error(Refused(code, "why", "client"), "a", route).peer_id == "a"
    if isinstance(told, PeerRefused):
        assert told.code == code


async def test_a_refused_opening_leaves_nothing_open_anywhere(checkpoint: Checkpoint) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        script(swarm.network, "b", saying(Refused("busy", "not today"), End()), opened=False)
        with pytest.raises(PeerRefused, match="not today") as caught:
            await open_over(swarm, route_over(a=(0, 3), b=(3, 8)))
        assert (caught.value.peer_id, caught.value.code) == ("b", "busy")
        await swarm.all_closed()


async def test_a_hop_that_answers_an_opening_with_something_else_is_named(checkpoint: Checkpoint) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", saying(End()), opened=False)
        with pytest.raises(ProtocolViolation, match="answered End to an opening") as caught:
            await open_over(swarm, route_over(a=(0, 8)))
        assert caught.value.peer_id == "a"


async def test_a_hop_out_of_reach_is_named(checkpoint: Checkpoint) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        with pytest.raises(PeerUnreachable) as caught:
            await open_over(swarm, route_over(a=(0, 3), nobody=(3, 8)))
        assert caught.value.peer_id == "nobody"
        await swarm.all_closed()


async def test_a_hop_that_never_answers_an_opening_is_named(
    checkpoint: Checkpoint, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", stay)
        script(swarm.network, "b", stay, opened=False)
        with pytest.raises(PeerUnreachable, match="within 15 s") as caught:
            await open_over(swarm, route_over(a=(0, 3), b=(3, 8)))
        assert caught.value.peer_id == "b"


async def test_an_opening_that_is_cancelled_leaves_nothing_open(checkpoint: Checkpoint) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        script(swarm.network, "b", stay, opened=False)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_over, swarm, route_over(a=(0, 3), b=(3, 8)))
                while not swarm.served["a"].server.sessions:
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        await swarm.all_closed()


@pytest.mark.parametrize("name", ["chunk_tokens", "chunks_in_flight", "open_timeout_s", "step_timeout_s"])
def test_nobody_walks_with_nothing(name: str) -> None:
    nothing: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; it must be above 0"):
        SessionConfig(**nothing)
