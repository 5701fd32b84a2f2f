"""A client's side of sessions: over real blocks, and against hops that say what they should not."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import (
    PeerVanished,
    ProtocolViolation,
    WrongOutput,
)
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import (
    Bill,
    End,
    Opened,
    Refused,
    Result,
    Step,
    Successor,
)
from p2pinfer.routing.route import Hop, Route

from ..node.memory_swarm import open_memory_swarm, route_over
from .hops import ROW, Script, hidden_states, one_hop, open_over, saying, script, stay


def answering(*results: tuple[Result, bytes]) -> Script:
    """Play one result for every step that comes."""

    async def play(frames: FrameStream) -> None:
        for result, payload in results:
            step, _ = await frames.receive()
            assert isinstance(step, Step)
            await frames.send(result, payload)
        await stay(frames)

    return play


async def test_chunks_follow_each_other_without_waiting_and_no_more_than_allowed(
    checkpoint: Checkpoint,
) -> None:
    seen: list[tuple[int, int, int]] = []
    waiting = trio.Event()

    async def play(frames: FrameStream) -> None:
        for _ in range(3):
            step, payload = await frames.receive()
            assert isinstance(step, Step)
            assert len(payload) == step.tokens * 1280
            seen.append((step.position, step.tokens, step.returns))
        waiting.set()
        for number in range(3):
            await frames.send(Result(number, 0, 0))
        step, _ = await frames.receive()
        assert isinstance(step, Step)
        seen.append((step.position, step.tokens, step.returns))
        await frames.send(Result(3, 0, 1), ROW)
        await stay(frames)

    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", play)
        config = SessionConfig(chunk_tokens=4, chunks_in_flight=3)
        session = await open_over(swarm, route_over(a=(0, 8)), config)
        last = await session.prefill(hidden_states(14), 5)
        assert waiting.is_set()
        assert last.shape == (1, 320)
        assert seen == [(5, 4, 0), (9, 4, 0), (13, 4, 0), (17, 2, 1)]
        await session.aclose()


async def test_every_hop_is_told_its_neighbours(checkpoint: Checkpoint) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        asked = [script(swarm.network, peer, stay) for peer in "abc"]
        hops = [
            Hop(hop.peer_id, hop.span, (f"/memory/{hop.peer_id}",))
            for hop in route_over(a=(0, 1), b=(1, 6), c=(6, 8)).hops
        ]
        session = await open_over(swarm, Route(tuple(hops)), max_tokens=99)
        first, second, third = (openings[0] for openings in asked)
        assert (first.predecessor, second.predecessor, third.predecessor) == (None, "a", "b")
        assert first.successor == Successor("b", ("/memory/b",))
        assert second.successor == Successor("c", ("/memory/c",))
        assert third.successor is None
        assert [(opening.start, opening.stop) for opening in (first, second, third)] == [
            (0, 1),
            (1, 6),
            (6, 8),
        ]
        assert {opening.session for opening in (first, second, third)} == {first.session}
        assert {opening.max_tokens for opening in (first, second, third)} == {99}
        await session.aclose()


async def test_what_each_hop_spent_is_told_by_its_median(checkpoint: Checkpoint) -> None:
    def bills(first: int, second: int) -> tuple[Bill, ...]:
        return (Bill(0, 0, first, 1), Bill(0, 0, second, 1))

    spent = [(1000, 500), (9000, 700), (2000, 600)]
    play = answering(*((Result(number, 0, 1, bills(*us)), ROW) for number, us in enumerate(spent)))
    async with one_hop(checkpoint, play) as session:
        assert session.per_hop_ms() == ()
        assert session.per_step_ms() == 0.0
        for position in range(3):
            await session.decode(hidden_states(1), position)
        assert session.per_hop_ms() == (2.0, 0.6)
        assert session.per_step_ms() > 0


@pytest.mark.parametrize(
    ("result", "payload"),
    [
        (Result(1, 0, 1), ROW),  # another step's
        (Result(0, 1, 1), ROW),  # of an epoch that never was
        (Result(0, 0, 0), b""),  # fewer rows than asked for
        (Result(0, 0, 2), ROW * 2),  # more rows than asked for
        (Result(0, 0, 1), ROW[:-1]),  # a truncated row
    ],
)
async def test_a_result_that_does_not_answer_its_step_is_a_violation(
    checkpoint: Checkpoint, result: Result, payload: bytes
) -> None:
    async with one_hop(checkpoint, answering((result, payload))) as session:
        with pytest.raises(ProtocolViolation) as caught:
            await session.decode(hidden_states(1), 0)
        assert caught.value.peer_id == "a"


async def test_an_output_that_is_not_finite_is_a_wrong_output(checkpoint: Checkpoint) -> None:
    not_a_number = b"\0\0\xc0\x7f" * 320
    async with one_hop(checkpoint, answering((Result(0, 0, 1), not_a_number))) as session:
        with pytest.raises(WrongOutput) as caught:
            await session.decode(hidden_states(1), 0)
        assert caught.value.peer_id == "a"


async def test_results_that_nobody_asked_for_end_the_session_and_not_the_client(
    checkpoint: Checkpoint,
) -> None:
    flood = [Result(number, 0, 0) for number in range(1000)]
    async with one_hop(checkpoint, saying(*flood)) as session:
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ProtocolViolation, match="nobody asked for") as caught:
            await session.decode(hidden_states(1), 0)
        assert caught.value.peer_id == "a"


@pytest.mark.parametrize("message", [Opened("float32"), End()])
async def test_what_a_hop_may_not_say_ends_the_session(checkpoint: Checkpoint, message: Opened | End) -> None:
    async with one_hop(checkpoint, saying(message)) as session:
        with pytest.raises(ProtocolViolation, match=f"{type(message).__name__} in the middle"):
            await session.decode(hidden_states(1), 0)


async def test_only_the_last_hop_may_answer(checkpoint: Checkpoint) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", answering((Result(0, 0, 1), ROW)))
        script(swarm.network, "b", stay)
        session = await open_over(swarm, route_over(a=(0, 3), b=(3, 8)))
        with pytest.raises(ProtocolViolation, match="Result in the middle") as caught:
            await session.decode(hidden_states(1), 0)
        assert caught.value.peer_id == "a"
        await session.aclose()


async def test_results_after_another_hop_s_refusal_are_nobody_s(checkpoint: Checkpoint) -> None:
    refused = trio.Event()
    answered = trio.Event()

    async def refuse(frames: FrameStream) -> None:
        await frames.receive()
        await frames.send(Refused("successor_vanished", "the next hop is gone", "b"))
        await stay(frames)

    async def answer_late(frames: FrameStream) -> None:
        await refused.wait()
        await frames.send(Result(0, 0, 1), ROW)
        answered.set()
        await stay(frames)

    async with open_memory_swarm(checkpoint) as swarm:
        script(swarm.network, "a", refuse)
        script(swarm.network, "b", answer_late)
        session = await open_over(swarm, route_over(a=(0, 3), b=(3, 8)))
        with pytest.raises(PeerVanished) as caught:
            await session.decode(hidden_states(1), 0)
        assert caught.value.peer_id == "b"
        refused.set()
        await answered.wait()
        await trio.testing.wait_all_tasks_blocked()
        await session.aclose()
