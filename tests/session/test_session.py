"""A client's side of sessions: over real blocks, and against hops that say what they should not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

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
    SESSION_PROTOCOL,
    Bill,
    End,
    Open,
    Opened,
    RefusalCode,
    Refused,
    Result,
    Step,
    Successor,
)
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.routing.route import Hop, Route
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.opening import refusal_error
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


def answering(*results: tuple[Result, bytes]) -> Script:
    """Play one result for every step that comes."""

    async def play(frames: FrameStream) -> None:
        for result, payload in results:
            step, _ = await frames.receive()
            assert isinstance(step, Step)
            await frames.send(result, payload)
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
