"""Sessions that begin with another one of their client: what they compute, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from p2pinfer.client_config import SessionConfig
from p2pinfer.generation.kept_texts import kept_s
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import Chunk, SpanRunner
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.messages import Opened, Prefix, Step
from p2pinfer.reputation.receipt import decode_receipt
from p2pinfer.routing.route import Route
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session

from ..node.chain_swarm import Swarm, assert_close, hidden_states, local_output, open_swarm, refusal

HELD = 150  # tokens of the first session: two pages, and a part of one


async def begin(
    swarm: Swarm, prefix: Prefix | None = None, *, max_tokens: int = 300, route: Route | None = None
) -> Session:
    opening = open_session(
        swarm.client,
        route or swarm.route,
        swarm.spec,
        max_tokens=max_tokens,
        codec="float32",
        config=SessionConfig(chunk_tokens=60),
        keep_steps=True,
        prefix=prefix,
    )
    return await start_session(swarm.network.nursery, opening)


async def keep(swarm: Swarm, hidden: Tensor) -> bytes:
    """The name of a session that held these tokens, the last two of them decoded, and has ended."""
    session = await begin(swarm)
    await session.prefill(hidden[:-2], 0)
    # Guesses that were wrong: what was rolled back is no part of what is kept.
    await session.decode(hidden_states(5, seed=9), len(hidden) - 2)
    await session.decode(hidden[-2:], len(hidden) - 2)
    assert kept_s(session) > 0
    await session.aclose(keep=True)
    return session.session_id


def count_rows(runner: SpanRunner) -> list[int]:
    """Rows of each chunk that a runner computes from now on."""
    rows: list[int] = []
    run = runner.run

    def counted(chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        rows.extend(len(chunk.hidden) for chunk in chunks)
        return run(chunks, span)

    runner.run = counted  # type: ignore[method-assign]
    return rows


@pytest.mark.parametrize("cuts, tokens", [((), HELD), ((2, 5), HELD), ((4,), 128), ((2, 5), 100)])
async def test_a_session_goes_on_where_another_one_was(
    checkpoint: Checkpoint, cuts: tuple[int, ...], tokens: int
) -> None:
    hidden = hidden_states(HELD)
    other = hidden_states(60, seed=3)
    async with open_swarm(checkpoint, *cuts) as swarm:
        name = await keep(swarm, hidden)
        rows = [count_rows(runner) for runner in swarm.runners.values()]
        session = await begin(swarm, Prefix(name, tokens))
        assert session.chain.prefix == tokens
        whole = [*hidden[:tokens], *other]
        inputs = hidden_states(len(whole))
        inputs[:tokens], inputs[tokens:] = hidden[:tokens], other
        expected = local_output(checkpoint, inputs)
        last = await session.prefill(inputs[:-1], 0, kept=tokens)
        assert_close(last, expected[-2:-1])
        assert_close(await session.decode(inputs[-1:], len(inputs) - 1), expected[-1:])
        assert all(sum(each) == len(other) for each in rows)
        # Every hop signs for all positions in this session's own name, as if it had computed them here.
        assert await session.settle() is None
        assert session.book is not None
        signed = [decode_receipt(each.receipts[-1]) for each in session.book.kept]
        assert [each.sequence for each in signed] == [*range(len(signed))]
        assert sum(each.tokens for each in signed) == len(inputs)
        await session.aclose()
        await swarm.all_closed()


async def test_two_sessions_go_on_from_one_at_a_time(checkpoint: Checkpoint) -> None:
    """The second one begins at the page in which the first one writes."""
    hidden, ends = hidden_states(HELD + 1), [hidden_states(10, seed) for seed in (1, 2)]
    async with open_swarm(checkpoint, 4) as swarm:
        name = await keep(swarm, hidden)
        sessions = [await begin(swarm, Prefix(name, HELD)) for _ in ends]
        assert [each.chain.prefix for each in sessions] == [HELD, 128]
        inputs = [hidden_states(HELD + 10) for _ in ends]
        for each, end in zip(inputs, ends, strict=True):
            each[:HELD], each[HELD:] = hidden[:HELD], end
        expected = [local_output(checkpoint, each) for each in inputs]
        for session, each in zip(sessions, inputs, strict=True):
            await session.prefill(each[: HELD + 1], 0, kept=session.chain.prefix)
        for at in range(HELD + 1, HELD + 10):
            for session, each, output in zip(sessions, inputs, expected, strict=True):
                assert_close(await session.decode(each[at : at + 1], at), output[at : at + 1])
        for session in sessions:
            await session.aclose()
        await swarm.all_closed()


async def test_a_hop_that_has_nothing_makes_all_begin_at_the_beginning(checkpoint: Checkpoint) -> None:
    hidden = hidden_states(HELD + 20)
    async with open_swarm(checkpoint, 3, 5) as swarm:
        name = await keep(swarm, hidden[:HELD])
        await swarm.all_closed()
        cache = swarm.runners["b"].cache
        cache.reserve(cache.capacity_tokens).release()
        session = await begin(swarm, Prefix(name, HELD))
        assert [hop.opened.prefix for hop in session.chain.hops] == [HELD, 0, HELD]
        assert session.chain.prefix == 0
        assert_close(await session.prefill(hidden, 0), local_output(checkpoint, hidden)[-1:])
        assert await session.settle() is None
        await session.aclose()


async def test_nobody_begins_with_the_session_of_another_client(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        name = await keep(swarm, hidden_states(HELD))
        owner, swarm.client = swarm.client, swarm.network.host("thief")
        thief = await begin(swarm, Prefix(name, HELD))
        assert thief.chain.prefix == 0
        await thief.aclose()
        swarm.client = owner
        session = await begin(swarm, Prefix(name, HELD))
        assert session.chain.prefix == HELD
        await session.aclose()


async def test_a_session_that_was_not_to_be_kept_is_gone(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint) as swarm:
        session = await begin(swarm)
        await session.prefill(hidden_states(HELD), 0)
        await session.aclose()
        again = await begin(swarm, Prefix(session.session_id, HELD))
        assert again.chain.prefix == 0
        await again.aclose()


async def test_what_is_kept_takes_no_room_from_anybody(checkpoint: Checkpoint) -> None:
    async with open_swarm(checkpoint, client_share=1.0) as swarm:
        cache = swarm.runners["a"].cache
        name = await keep(swarm, hidden_states(HELD))
        await swarm.all_closed()
        assert swarm.servers["a"].free_tokens == cache.capacity_tokens
        session = await begin(swarm, max_tokens=cache.capacity_tokens)
        await session.aclose()
        await swarm.all_closed()
        later = await begin(swarm, Prefix(name, HELD))
        assert later.chain.prefix == 0
        await later.aclose()


@pytest.mark.parametrize(
    "steps, said",
    [
        ([Step(0, 0, 0, 151, 0, kept=True)], "names a prefix"),  # more than there is
        ([Step(0, 0, 0, 60, 1, kept=True)], "brings"),  # rows back, which nobody has
        ([Step(0, 0, 60, 60, 0, kept=True)], "begins at 60, not at 0"),  # a gap
        (
            [Step(0, 0, 0, 60, 0), Step(1, 0, 60, 60, 0, kept=True)],
            "names a prefix",
        ),  # after a step of its own
    ],
)
async def test_what_a_hop_has_not_computed_it_signs_for_nobody(
    checkpoint: Checkpoint, steps: list[Step], said: str
) -> None:
    async with open_swarm(checkpoint) as swarm:
        name = await keep(swarm, hidden_states(HELD))
        frames = await swarm.ask(max_tokens=300, prefix=Prefix(name, HELD))
        opened = (await frames.receive())[0]
        assert isinstance(opened, Opened)
        assert opened.prefix == HELD
        for step in steps:
            await frames.send(step, b"" if step.kept else bytes(1280 * step.tokens))
        refused = await refusal(frames)
        assert refused.code == "protocol"
        assert said in refused.message


async def test_pages_that_others_read_are_never_written(checkpoint: Checkpoint) -> None:
    """A client that goes back behind its prefix is refused, and another session there is as it was."""
    hidden = hidden_states(HELD + 2)
    async with open_swarm(checkpoint) as swarm:
        name = await keep(swarm, hidden[:HELD])
        session = await begin(swarm, Prefix(name, HELD))
        await session.prefill(hidden[: HELD + 1], 0, kept=HELD)
        frames = await swarm.ask(max_tokens=300, prefix=Prefix(name, HELD))
        for number, position in enumerate((0, 64)):
            await frames.send(Step(number, 0, position, 64, 0, kept=True))
        await frames.send(Step(2, 0, 128, 1, 1), bytes(1280))
        await frames.send(Step(3, 1, 10, 1, 1), bytes(1280))
        assert (await refusal(frames)).code == "cache_full"
        output = await session.decode(hidden[HELD + 1 :], HELD + 1)
        assert_close(output, local_output(checkpoint, hidden)[-1:])
        await session.aclose()
