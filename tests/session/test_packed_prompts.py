"""Sessions whose prompts travel packed: what hops compute, sign, keep and replay."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import torch
from torch import Tensor

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.packed_rows import rounded_rows
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.frames import FrameStream
from p2pinfer.node.protocol.messages import (
    Open,
    Opened,
    Prefix,
    Step,
    decode_message,
    encode_message,
)
from p2pinfer.node.protocol.tensors import encode_hidden, round_hidden
from p2pinfer.reputation.receipt import decode_receipt, digest_of
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session

from ..node.chain_swarm import Swarm, open_swarm, refusal
from ..node.chain_swarm import hidden_states as some_states
from ..node.memory_swarm import FLOAT32, MemorySwarm, open_memory_swarm, route_over
from ..spares import CHUNKS, OTHERS, PROMPT, TOTAL, WAY, Spares, hidden_states, serve


@asynccontextmanager
async def packing(
    swarm: MemorySwarm, spares: Spares, inputs: Tensor, packed: int = PROMPT
) -> AsyncGenerator[Session]:
    session = await start_session(
        swarm.network.nursery,
        open_session(
            swarm.network.host("client"),
            route_over(**WAY),
            swarm.spec,
            max_tokens=TOTAL,
            codec="float32",
            config=CHUNKS,
            replay_source=lambda start, stop: inputs[start:stop],
            replanner=spares,
            keep_steps=True,
            packed=packed,
        ),
    )
    yield session
    await session.aclose()
    await swarm.all_closed()


def on_one_machine(
    checkpoint: Checkpoint, inputs: Tensor, packed: int, spans: Sequence[tuple[int, int]]
) -> Tensor:
    """What one machine gives that rounds the first positions before each span."""
    hidden = inputs
    for start, stop in spans:
        hidden = torch.cat([rounded_rows(hidden[:packed]), hidden[packed:]])
        runner = open_runner(checkpoint, BlockSpan(start, stop), FLOAT32)
        (hidden,) = runner.run([Chunk(runner.cache.reserve(TOTAL), 0, hidden)])
    return hidden


def near(output: Tensor, expected: Tensor) -> None:
    # Chunks of other lengths round otherwise in the last bits, and one in some hundred thousand values then
    # becomes the next integer.
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)


async def the_rest(session: Session, inputs: Tensor, start: int = PROMPT, stop: int = TOTAL) -> list[Tensor]:
    return [await session.decode(inputs[at : at + 1], at) for at in range(start, stop)]


async def test_a_prompt_travels_in_a_quarter_of_its_bytes_and_the_rest_as_it_is(
    checkpoint: Checkpoint,
) -> None:
    inputs = hidden_states()
    expected = on_one_machine(checkpoint, inputs, PROMPT, list(WAY.values()))
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY)
        sizes: list[tuple[Step, int]] = []
        send = FrameStream.send_now

        def noting(self: FrameStream, message: object, payload: bytes = b"") -> bool:
            if isinstance(message, Step):
                sizes.append((message, len(payload)))
            return send(self, message, payload)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FrameStream, "send_now", noting)
            async with packing(swarm, Spares(), inputs) as session:
                near(await session.prefill(inputs[:PROMPT], 0), expected[PROMPT - 1 : PROMPT])
                near(torch.cat(await the_rest(session, inputs)), expected[PROMPT:])
                assert await session.settle() is None
                assert session.book is not None
                kept = session.book.kept
    assert {size / step.tokens for step, size in sizes if step.position < PROMPT} == {320 + 10}
    assert {size / step.tokens for step, size in sizes if step.position >= PROMPT} == {4 * 320}
    for passed in kept:
        receipts = [decode_receipt(each) for each in passed.receipts]
        rounded = "float32_int8" if passed.step.position < PROMPT else "float32"
        assert [each.codec for each in receipts] == [rounded, rounded, "float32"]
        assert receipts[0].input == digest_of(passed.sent)


@pytest.mark.parametrize("victims", ["a", "b", "c", "ab"])
@pytest.mark.parametrize("at", [0, PROMPT, PROMPT + 4])
async def test_hops_that_take_over_have_what_the_former_ones_had_to_the_bit(
    victims: str, at: int, checkpoint: Checkpoint
) -> None:
    inputs = hidden_states()
    outputs: list[list[Tensor]] = []
    for fails in (False, True):
        async with open_memory_swarm(checkpoint) as swarm:
            await serve(swarm, **WAY, **dict(zip("def", WAY.values(), strict=True)))
            spares = Spares(**dict(zip("def", WAY.values(), strict=True)))
            async with packing(swarm, spares, inputs) as session:
                if fails and not at:
                    for victim in victims:
                        await swarm.network.kill(victim)
                got = [await session.prefill(inputs[:PROMPT], 0)]
                got += await the_rest(session, inputs, PROMPT, max(at, PROMPT))
                if fails and at:
                    for victim in victims:
                        await swarm.network.kill(victim)
                got += await the_rest(session, inputs, max(at, PROMPT))
                assert bool(session.failovers) is fails
                assert all(gap.packs for gap in spares.gaps)
                outputs.append(got)
    undisturbed, disturbed = outputs
    near(torch.cat(disturbed), torch.cat(undisturbed))


async def test_spans_of_other_lengths_take_over_in_a_packed_session(checkpoint: Checkpoint) -> None:
    inputs = hidden_states()
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY, **OTHERS)
        async with packing(swarm, Spares(**OTHERS), inputs) as session:
            await session.prefill(inputs[:PROMPT], 0)
            await swarm.network.kill("b")
            await the_rest(session, inputs)
            assert session.failovers == 1
            assert await session.settle() is None


async def test_a_step_that_is_packed_in_part_is_refused(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        frames = await swarm.ask(packed=4)
        assert isinstance((await frames.receive())[0], Opened)
        await frames.send(Step(0, 0, 0, 6, 0), round_hidden(some_states(6), "float32")[1])
        refused = await refusal(frames)
        assert (refused.code, refused.message) == ("protocol", "step 0 is packed in part")


@pytest.mark.parametrize("content", [encode_hidden(some_states(4), "float32"), b"", b"\0" * 1319])
async def test_a_step_of_another_size_than_packed_rows_have_is_refused(
    content: bytes, checkpoint: Checkpoint
) -> None:
    async with open_swarm(checkpoint) as swarm:
        frames = await swarm.ask(packed=4)
        assert isinstance((await frames.receive())[0], Opened)
        await frames.send(Step(0, 0, 0, 4, 0), content)
        refused = await refusal(frames)
        assert refused.code == "protocol"
        assert "1320 expected" in refused.message


async def test_a_receipt_that_claims_a_rounding_that_was_not_asked_for_is_refused(
    checkpoint: Checkpoint,
) -> None:
    """Else a hop could have its audits allow for what it rounds on its own account."""
    inputs = hidden_states()
    async with open_memory_swarm(checkpoint) as swarm:
        await serve(swarm, **WAY)
        async with packing(swarm, Spares(), inputs) as session:
            await session.prefill(inputs[:PROMPT], 0)
            assert session.book is not None
            await session.settle()
            session.book._packed = 0  # pyright: ignore[reportPrivateUsage]
            await session.decode(inputs[PROMPT : PROMPT + 1], PROMPT)
            assert await session.settle() is None
            session.book._packed = TOTAL  # pyright: ignore[reportPrivateUsage]
            await session.decode(inputs[PROMPT + 1 : PROMPT + 2], PROMPT + 1)
            error = await session.settle()
            assert isinstance(error, ProtocolViolation)
            assert error.peer_id == "a"


async def begin(swarm: Swarm, packed: int, prefix: Prefix | None = None) -> Session:
    opening = open_session(
        swarm.client,
        swarm.route,
        swarm.spec,
        max_tokens=300,
        codec="float32",
        config=CHUNKS,
        keep_steps=True,
        prefix=prefix,
        packed=packed,
    )
    return await start_session(swarm.network.nursery, opening)


@pytest.mark.parametrize(
    ("former", "packed", "common"),
    [(100, 100, 140), (100, 130, 100), (130, 100, 100), (0, 100, 0), (100, 0, 0), (0, 0, 140)],
)
async def test_a_prefix_ends_where_one_session_rounds_and_the_other_does_not(
    former: int, packed: int, common: int, checkpoint: Checkpoint
) -> None:
    hidden = some_states(150)
    async with open_swarm(checkpoint, 4) as swarm:
        first = await begin(swarm, former)
        await first.prefill(hidden[:140], 0)
        await first.aclose(keep=True)
        second = await begin(swarm, packed, Prefix(first.session_id, 140))
        kept = second.chain.prefix
        assert kept == common
        output = await second.prefill(hidden, 0, kept=kept)
        assert await second.settle() is None
        anew = await begin(swarm, packed)
        near(output, await anew.prefill(hidden, 0))
        await second.aclose()
        await anew.aclose()


def test_an_opening_of_before_packs_nothing() -> None:
    words = msgspec.msgpack.decode(encode_message(Open(b"s" * 16, "r", 0, 1, 4, "float32")))
    opening = decode_message(msgspec.msgpack.encode(words[:-1]))
    assert isinstance(opening, Open)
    assert opening.packed == 0
