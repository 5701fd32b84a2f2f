"""What a hop makes of its steps: alone with a worker that only collects, and in chains that compute."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import trio
import trio.testing
from torch import Tensor

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import PeerRefused
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.compute.runner import Chunk, SpanRunner
from p2pinfer.models.numerics import FLOAT32
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import Open, Opened, Result, Step
from p2pinfer.node.serve.decode_speed import DecodeSpeed
from p2pinfer.node.serve.forward import ServedSpan, StepWork
from p2pinfer.node.serve.hop_session import HopSession
from p2pinfer.node.serve.quota import CacheRoom
from p2pinfer.node.serve.receipt_signer import ReceiptSigner
from p2pinfer.node.serve.worker import BatchReport, Worker
from p2pinfer.routing.route import Hop, Route

from ..chain_swarm import assert_close, hidden_states, local_output, open_swarm, refusal
from ..memory import sign


class Echo:
    """Blocks that compute nothing."""

    span = BlockSpan(0, 1)

    def run(self, chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        return [chunk.hidden for chunk in chunks]


class Room:
    """Room for everything."""

    lease = SimpleNamespace(max_tokens=1 << 20, length=0, own_from=0)
    filled = 0


class Collector:
    """A worker that does what it is given when it is told to."""

    def __init__(self) -> None:
        self.works: list[StepWork] = []
        self.released: list[object] = []

    def submit(self, work: StepWork) -> None:
        self.works.append(work)

    def release(self, lease: object) -> None:
        self.released.append(lease)

    def wanted(self) -> list[bool]:
        """Of each piece, whether it would be computed."""
        return [work.is_wanted() for work in self.works]

    def finish(self) -> None:
        """Compute everything that is wanted, piece by piece."""
        for work in self.works:
            done = work.run([work])
            for each in done:
                each.finish()
            work.deliver(BatchReport(0.0, 0.0, 0.0, len(done)))
        self.works.clear()


@dataclass(frozen=True)
class Spec:
    hidden_size: int = 2


def open_hop(worker: Collector, speed: DecodeSpeed | None = None) -> tuple[HopSession, FrameStream]:
    ours, theirs = trio.testing.memory_stream_pair()
    opening = Open(b"s" * 16, "r", 0, 1, 64, "float32")
    served = ServedSpan(
        cast(ModelSpec, Spec()), cast(SpanRunner, Echo()), cast(Worker, worker), speed or DecodeSpeed(1.0)
    )
    session = HopSession(
        opening,
        "client",
        FrameStream(ours, max_payload_bytes=1000, peer_id="client"),
        served=served,
        room=cast(CacheRoom, Room()),
        replay=None,
        config=ServeConfig(max_steps_in_flight=16),
        signer=ReceiptSigner(opening, FLOAT32, partial(sign, "hop")),
        evidence=EvidenceStore(1 << 20, 900),
    )
    return session, FrameStream(theirs, max_payload_bytes=1000)


def send(session: HopSession, number: int, epoch: int, position: int, tokens: int) -> None:
    step = Step(number, epoch, position, tokens, 1)
    session.accept(step, bytearray(8 * tokens), session.neighbours.control)


async def test_a_higher_epoch_drops_what_begins_at_or_after_it_and_nothing_before() -> None:
    worker = Collector()
    session, client = open_hop(worker)
    for number, position in enumerate([0, 4, 6, 8]):
        send(session, number, 0, position, 4 if number == 0 else 2)
    send(session, 4, 1, 6, 2)
    assert worker.wanted() == [True, True, False, False, True]
    send(session, 5, 2, 7, 1)
    assert worker.wanted() == [True, True, False, False, True, True]
    send(session, 6, 3, 2, 1)
    assert worker.wanted() == [True, False, False, False, False, False, True]
    worker.finish()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.outbox.send_computed)
        answered = [(await client.receive())[0] for _ in range(2)]
        assert [message.number for message in answered if isinstance(message, Result)] == [0, 6]
        # With nothing in flight the roll-backs are history: the same positions count again.
        send(session, 7, 3, 3, 1)
        assert worker.wanted() == [True]
        nursery.cancel_scope.cancel()


async def test_results_for_a_closed_session_go_nowhere() -> None:
    worker = Collector()
    session, _ = open_hop(worker)
    send(session, 0, 0, 0, 1)
    send(session, 1, 0, 1, 1)
    done = worker.works[0].run([worker.works[0]])
    session.close()
    session.close()
    assert worker.wanted() == [False, False] and len(worker.released) == 1
    assert len(done) == 1
    for work in worker.works:
        work.deliver(BatchReport(0.0, 0.0, 0.0, 1))
    assert session.lifetime.ended_by is None


async def test_what_is_not_finite_ends_the_session_and_is_not_computed_nor_what_follows() -> None:
    worker = Collector()
    session, _ = open_hop(worker)
    step = Step(0, 0, 0, 1, 1)
    session.accept(step, bytearray(b"\0\0\xc0\x7f" * 2), session.neighbours.control)
    send(session, 1, 0, 1, 1)
    assert worker.wanted() == [False, False]
    worker.finish()
    ended_by = session.lifetime.ended_by
    assert ended_by is not None and (ended_by.code, ended_by.about_peer) == ("wrong_input", "client")


async def test_only_a_step_that_had_all_blocks_to_itself_counts_for_the_speed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Not a prompt, not one that failed, not several at once, not a part of the blocks."""
    worker, speed = Collector(), DecodeSpeed(1.0)
    session, _ = open_hop(worker, speed)
    for number, (position, tokens) in enumerate([(0, 3), (3, 1), (4, 1), (5, 1)]):
        send(session, number, 0, position, tokens)
    prompt, alone, with_another, dropped = worker.works
    for work in (prompt, alone, with_another):
        work.run([work])
    part = StepWork(
        replace(session._context, span=BlockSpan(0, 1)),  # pyright: ignore[reportPrivateUsage]
        Step(4, 0, 6, 1, 1),
        torch.zeros(1, 2),
        bytearray(8),
        session.neighbours.control,
        0.0,
    )
    part.run([part])
    for seconds, (work, tokens) in enumerate(
        [(prompt, 3), (alone, 1), (with_another, 2), (dropped, 1), (part, 1)]
    ):
        work.deliver(BatchReport(0.0, seconds, seconds, tokens))
    assert [seconds for _, seconds in speed.steps] == [1]


async def test_only_a_chunk_that_had_all_blocks_to_itself_counts_for_their_cost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Not guesses at some tokens, nor a chunk beside another client's."""
    worker, speed = Collector(), DecodeSpeed(1.0)
    session, _ = open_hop(worker, speed)
    for number, (position, tokens) in enumerate([(0, 20), (20, 17), (37, 4)]):
        send(session, number, 0, position, tokens)
    alone, beside_another, guesses = worker.works
    for seconds, (work, tokens) in enumerate([(alone, 20), (beside_another, 18), (guesses, 4)], 1):
        work.run([work])
        work.deliver(BatchReport(0.0, 0.0, seconds, tokens))
    assert list(speed.chunks) == [(20, 1)]


async def test_a_step_is_taken_from_who_is_expected_and_from_nobody_else() -> None:
    worker = Collector()
    session, _ = open_hop(worker)
    control = session.neighbours.control
    other, stranger = (
        FrameStream(trio.testing.memory_stream_pair()[0], max_payload_bytes=0, peer_id=name)
        for name in ("b", "mallory")
    )
    session.neighbours.expect("b")

    def accept(number: int, feeder: FrameStream, replay: int = 0) -> None:
        session.accept(Step(number, 0, number, 1, 1, replay=replay), bytearray(8), feeder)

    def taken() -> list[int]:
        return [work.step.number for work in worker.works]

    accept(0, control)
    accept(9, stranger)  # far too late a position, which would be a violation
    accept(1, other, replay=1)
    accept(2, control)
    assert taken() == [0, 1, 2]
    accept(3, other)  # which takes over
    accept(9, control)
    accept(4, other)
    assert taken() == [0, 1, 2, 3, 4]
    session.neighbours.expect("client")  # and back again
    accept(5, other)
    accept(6, control)
    accept(9, other)
    assert taken() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("cuts", [(), (3,), (1, 6), (2, 3, 7)])
async def test_a_chain_computes_what_one_machine_computes(
    checkpoint: Checkpoint, cuts: tuple[int, ...]
) -> None:
    hidden = hidden_states(40)
    expected = local_output(checkpoint, hidden)
    async with open_swarm(checkpoint, *cuts) as swarm:
        session = await swarm.session(config=SessionConfig(chunk_tokens=7, chunks_in_flight=3))
        last = await session.prefill(hidden[:30], 0)
        assert_close(last, expected[29:30])
        for position in range(30, 40):
            output = await session.decode(hidden[position : position + 1], position)
            assert_close(output, expected[position : position + 1])
        assert len(session.per_hop_ms()) == len(cuts) + 1
        assert session.per_step_ms() >= max(session.per_hop_ms())
        await session.aclose()
        await swarm.all_closed()


async def test_a_route_may_use_a_part_of_what_a_peer_holds(checkpoint: Checkpoint) -> None:
    hidden = hidden_states(9)
    async with open_swarm(checkpoint) as swarm, open_swarm(checkpoint) as other:
        swarm.network.hosts["b"] = other.network.hosts["a"]
        route = Route((Hop("a", BlockSpan(0, 3)), Hop("b", BlockSpan(3, 8))))
        session = await swarm.session(route=route)
        output = await session.decode(hidden, 0)
        assert_close(output, local_output(checkpoint, hidden))
        await session.aclose()


async def test_a_lower_position_rolls_every_hop_back(checkpoint: Checkpoint) -> None:
    hidden = hidden_states(20)
    async with open_swarm(checkpoint, 3) as swarm:
        session = await swarm.session()
        await session.prefill(hidden_states(20, seed=1), 0)
        output = await session.decode(hidden[:20], 0)
        assert_close(output, local_output(checkpoint, hidden))
        await session.aclose()


async def test_sessions_at_once_do_not_disturb_each_other(checkpoint: Checkpoint) -> None:
    outputs: dict[int, Tensor] = {}
    async with open_swarm(checkpoint, 5) as swarm:

        async def use(seed: int) -> None:
            session = await swarm.session()
            outputs[seed] = await session.prefill(hidden_states(10 + seed, seed), 0)
            await session.aclose()

        async with trio.open_nursery() as nursery:
            for seed in range(8):
                nursery.start_soon(use, seed)
    for seed, output in outputs.items():
        expected = local_output(checkpoint, hidden_states(10 + seed, seed))[-1:]
        assert_close(output, expected)


@pytest.mark.parametrize(
    "step, payload, code",
    [
        (Step(0, 0, 1, 1, 1), bytes(1280), "protocol"),  # a gap
        (Step(0, 0, 0, 65, 1), bytes(1280 * 65), "protocol"),  # past the reservation
        (Step(0, 0, 0, 2, 3), bytes(1280 * 2), "protocol"),  # wants more back than it sends
        (Step(0, 0, 0, 2, 1), bytes(1280 * 2 - 1), "protocol"),  # a truncated tensor
        (Step(0, 0, 0, 1, 1), b"\0\0\xc0\x7f" * 320, "wrong_input"),  # not a number
        (Opened("float32"), b"", "protocol"),  # not for a client to say
    ],
)
async def test_a_wrong_frame_ends_its_session_and_touches_no_other(
    checkpoint: Checkpoint, step: Step | Opened, payload: bytes, code: str
) -> None:
    async with open_swarm(checkpoint) as swarm:
        honest = await swarm.session()
        frames = await swarm.ask()
        await frames.send(step, payload)
        assert (await refusal(frames)).code == code
        hidden = hidden_states(5)
        output = await honest.decode(hidden, 0)
        assert_close(output, local_output(checkpoint, hidden))
        await honest.aclose()
        await swarm.all_closed()


async def test_an_epoch_that_falls_is_a_violation(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        frames = await swarm.ask()
        await frames.send(Step(0, 2, 0, 1, 1), bytes(1280))
        await frames.send(Step(1, 1, 1, 1, 1), bytes(1280))
        assert "epoch 1 after 2" in (await refusal(frames)).message


@pytest.mark.parametrize(
    "limit, said",
    [
        ({"max_steps_in_flight": 3}, "more than 3 steps in flight"),
        ({"max_bytes_in_flight": 10 * 1280}, "more than 12800 bytes in flight"),
    ],
)
async def test_more_in_flight_than_allowed_ends_the_session(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, limit: dict[str, int], said: str
) -> None:
    async with open_swarm(checkpoint, **limit) as swarm:
        release = threading.Event()
        run = swarm.runners["a"].run

        def slow(chunks: Sequence[Chunk], span: BlockSpan) -> list[Tensor]:
            release.wait()
            return run(chunks, span)

        monkeypatch.setattr(swarm.runners["a"], "run", slow)
        frames = await swarm.ask()
        try:
            for number in range(4):
                await frames.send(Step(number, 0, number * 3, 3, 0), bytes(3 * 1280))
            assert said in (await refusal(frames)).message
        finally:
            release.set()
        await swarm.all_closed()


@pytest.mark.parametrize(
    "limit", [{"max_steps_in_flight": 1}, {"max_chunk_tokens": 3}, {"max_bytes_in_flight": 5 * 1280}]
)
async def test_a_client_keeps_to_what_the_hops_say_they_take(
    checkpoint: Checkpoint, limit: dict[str, int]
) -> None:
    hidden = hidden_states(40)
    async with open_swarm(checkpoint, 3, **limit) as swarm:
        session = await swarm.session()
        last = await session.prefill(hidden, 0)
        assert_close(last, local_output(checkpoint, hidden)[-1:])
        await session.aclose()


async def test_a_failed_step_takes_the_steps_behind_it_along_and_no_other_session(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint) as swarm:
        run, failed = swarm.runners["a"].run, threading.Event()

        def fail_once(chunks: Sequence[Chunk], span: BlockSpan) -> list[Tensor]:
            if len(chunks[0].hidden) == 3 and not failed.is_set():
                failed.set()
                raise RuntimeError("a cosmic ray")
            return run(chunks, span)

        honest, unlucky = await swarm.session(), await swarm.session(config=SessionConfig(chunk_tokens=3))
        monkeypatch.setattr(swarm.runners["a"], "run", fail_once)
        with pytest.raises(PeerRefused, match="a cosmic ray"):
            await unlucky.prefill(hidden_states(12), 0)
        hidden = hidden_states(5)
        output = await honest.decode(hidden, 0)
        assert_close(output, local_output(checkpoint, hidden))
        await unlucky.aclose()
        await honest.aclose()
        await swarm.all_closed()


async def test_a_batch_that_cannot_be_computed_is_reported(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_swarm(checkpoint) as swarm:

        def fail(chunks: object, span: object) -> list[Tensor]:
            raise RuntimeError("out of memory")

        session = await swarm.session()
        monkeypatch.setattr(swarm.runners["a"], "run", fail)
        with pytest.raises(PeerRefused, match="out of memory") as caught:
            await session.decode(hidden_states(1), 0)
        assert caught.value.code == "compute"
        await session.aclose()
        await swarm.all_closed()
