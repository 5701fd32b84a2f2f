"""Generations over real blocks: what they give, and what becomes of them when hops fail."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from torch import Tensor

from p2pinfer.errors import (
    NoRoute,
    PeerRefused,
    PeerUnreachable,
    PeerVanished,
    Unfinished,
)
from p2pinfer.generation.generation import Generation, Token
from p2pinfer.generation.outage import RetryLimits, Waiting
from p2pinfer.generation.remote_blocks import HopUsed
from p2pinfer.generation.speculation import Speculation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.session.session import Session

from ..node.memory_swarm import open_memory_swarm, route_over
from .texts import PROMPT, Walk, local_ids, resume, start


@pytest.mark.parametrize("depth", [None, 8])
async def test_what_was_to_be_expected_counts_trips_and_not_tokens(
    depth: int | None, checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk, speculation = Walk(swarm, route_over(a=(0, 8))), None if depth is None else Speculation(depth)
        walk.chunk_tokens = 16
        generation = start(
            walk,
            swarm,
            ends,
            tokenizer,
            "Tom has a red ball. Tom has a blue ball. Tom has a red ball. Tom has a",
            max_new_tokens=30,
            speculation=speculation,
            expected_s=lambda route, _: 100.0 * len(route.hops),
        )
        assert generation.result.timings.predicted_tokens_per_s is None
        _ = [token async for token in generation]
        result = generation.result
        per_trip = 1.0 if result.speculation is None else result.speculation.tokens_per_trip
        assert (per_trip > 1) == (depth is not None)
        # Draws and guesses were measured, and take next to nothing of 100 s.
        assert result.timings.predicted_tokens_per_s == pytest.approx(per_trip / 100, rel=0.02)
        await swarm.all_closed()


async def test_a_generation_gives_what_one_machine_gives(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        walk = Walk(swarm, route_over(a=(0, 3), b=(3, 8)))
        generation = start(walk, swarm, ends, tokenizer)
        before = generation.result
        assert (before.text, before.token_ids, before.finish_reason, before.route) == ("", (), None, ())
        assert before.timings.first_token_s == before.timings.tokens_per_s == 0
        tokens = [token async for token in generation]
        prompt_ids = tokenizer.encode(PROMPT)
        expected = local_ids(checkpoint, ends, prompt_ids, 10, seed=0)
        result = generation.result
        assert [token.id for token in tokens] == list(result.token_ids) == expected
        assert "".join(token.text for token in tokens) == result.text == tokenizer.decode(expected)
        assert (result.prompt_tokens, result.finish_reason, result.failovers) == (
            len(prompt_ids),
            "length",
            0,
        )
        assert result.route == (
            HopUsed("a", BlockSpan(0, 3), "direct"),
            HopUsed("b", BlockSpan(3, 8), "relayed"),
        )
        timings = result.timings
        assert len(timings.per_hop_ms) == 2
        assert timings.first_token_s > 0
        assert timings.tokens_per_s > 0
        assert timings.per_step_ms >= max(timings.per_hop_ms)
        assert walk.asked == [(len(prompt_ids) + 10, frozenset())]
        ((route, outcome),) = walk.outcomes
        assert (route.peer_ids, outcome.ok, outcome.error, outcome.failed_peer) == (
            ("a", "b"),
            True,
            None,
            None,
        )
        assert (outcome.tokens, outcome.per_hop_ms) == (10, timings.per_hop_ms)
        with pytest.raises(StopAsyncIteration):
            await anext(generation)
        await swarm.all_closed()


@pytest.mark.parametrize("seed", [0, 7])
async def test_a_hop_that_dies_changes_no_token(
    seed: int, checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a", 0, 3)
        await swarm.serve("b", 3, 8)
        await swarm.serve("c", 2, 8)
        walk = Walk(swarm, route_over(a=(0, 3), b=(3, 8)), route_over(a=(0, 2), c=(2, 8)))
        generation = start(walk, swarm, ends, tokenizer, temperature=1.0 if seed else 0.0, seed=seed)
        for _ in range(4):
            await anext(generation)
        assert generation.result.timings.per_hop_ms
        await swarm.network.kill("b")
        async for _ in generation:
            pass
        result = generation.result
        assert list(result.token_ids) == local_ids(checkpoint, ends, tokenizer.encode(PROMPT), 10, seed)
        assert result.failovers == 1
        assert [hop.peer_id for hop in result.route] == ["a", "c"]
        failed, done = (outcome for _, outcome in walk.outcomes)
        assert (failed.ok, failed.failed_peer, failed.tokens) == (False, "b", 4)
        assert failed.error
        assert (done.ok, done.tokens) == (True, 6)
        assert 0 < done.seconds < failed.seconds + done.seconds
        assert [excluded for _, excluded in walk.asked] == [frozenset(), frozenset({"b"})]
        await swarm.all_closed()


async def test_a_route_that_cannot_be_opened_is_no_failover(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, route_over(nobody=(0, 8)), route_over(a=(0, 8)))
        generation = start(walk, swarm, ends, tokenizer, max_new_tokens=1)
        assert [token async for token in generation] == [Token(*_only(generation))]
        assert generation.result.failovers == 0
        assert walk.asked[1][1] == {"nobody"}
        assert len(walk.outcomes) == 1


def _only(generation: Generation) -> tuple[int, str]:
    (token_id,) = generation.result.token_ids
    return token_id, generation.result.text


async def test_without_another_route_the_text_so_far_and_the_reason_are_kept(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        generation = start(Walk(swarm, route_over(a=(0, 8))), swarm, ends, tokenizer)
        tokens = [await anext(generation) for _ in range(3)]
        await swarm.network.kill("a")
        with pytest.raises(
            Unfinished, match="nobody serves blocks 0:8; the last one failed: the stream"
        ) as caught:
            await anext(generation)
        assert caught.value.missing == ((0, 8),)
        assert caught.value.text == generation.result.text
        assert caught.value.resume_token == generation.resume_token
        assert isinstance(caught.value.__cause__, PeerVanished)
        result = generation.result
        assert result.text == "".join(token.text for token in tokens)
        assert (len(result.token_ids), result.finish_reason, result.failovers) == (3, None, 1)


async def test_no_route_at_all_is_said_as_it_is(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        generation = start(Walk(swarm), swarm, ends, tokenizer)
        with pytest.raises(NoRoute, match=r"0:8$"):
            await anext(generation)
        assert generation.result.finish_reason is None


async def test_after_so_many_failures_in_a_row_the_last_one_comes_out(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        walk = Walk(swarm, *(route_over(**{f"gone-{n}": (0, 8)}) for n in range(9)))
        generation = start(walk, swarm, ends, tokenizer, retry_limits=RetryLimits(max_attempts=3))
        with pytest.raises(PeerUnreachable) as caught:
            await anext(generation)
        assert caught.value.peer_id == "gone-2"
        assert len(walk.asked) == 3


async def test_in_the_middle_of_a_text_so_many_failures_in_a_row_are_a_reason_to_pause(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    told: list[Waiting] = []
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        gone = [route_over(**{f"gone-{n}": (0, 8)}) for n in range(4)]
        walk = Walk(swarm, route_over(a=(0, 8)), *gone, route_over(b=(0, 8)))
        retry_limits = RetryLimits(wait_s=30.0, max_attempts=3)
        generation = start(walk, swarm, ends, tokenizer, retry_limits=retry_limits, on_wait=told.append)
        await anext(generation)
        await swarm.network.kill("a")
        await swarm.serve("b")
        async for _ in generation:
            pass
        assert [sorted(excluded) for _, excluded in walk.asked] == [
            [],
            ["a"],
            ["a", "gone-0"],
            [],  # after the pause
            ["gone-2"],
            ["gone-2", "gone-3"],
        ]
        assert [each.reason for each in told] == ["peer gone-1 cannot be reached"]
        assert generation.result.finish_reason == "length"


@pytest.mark.parametrize("seed", [0, 7])
async def test_a_text_waits_for_a_replacement_and_goes_on_as_if_nothing_had_happened(
    seed: int, checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, route_over(a=(0, 8)))
        waiting = trio.Event()
        told: list[Waiting] = []

        def note(reason: Waiting) -> None:
            told.append(reason)
            waiting.set()

        generation = start(
            walk,
            swarm,
            ends,
            tokenizer,
            retry_limits=RetryLimits(wait_s=30.0),
            on_wait=note,
            temperature=1.0 if seed else 0.0,
            seed=seed,
        )
        for _ in range(4):
            await anext(generation)
        await swarm.network.kill("a")
        async with trio.open_nursery() as nursery:

            async def go_on() -> None:
                async for _ in generation:
                    pass

            nursery.start_soon(go_on)
            await waiting.wait()
            walk.offer(route_over(b=(0, 8)))
            await swarm.serve("b")
        result = generation.result
        assert list(result.token_ids) == local_ids(checkpoint, ends, tokenizer.encode(PROMPT), 10, seed)
        assert (result.finish_reason, result.failovers) == ("length", 1)
        (waited,) = told
        assert waited.reason.startswith("no route: nobody serves blocks 0:8; the last one failed: ")
        assert waited.missing == ((0, 8),)
        assert 25 < waited.left_s <= 30


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9}]
)
@pytest.mark.parametrize("cut", [0, 1, 9])
async def test_a_resumed_text_is_the_one_that_an_undisturbed_run_gives(
    options: dict[str, Any], cut: int, checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    """Also where nobody gave a seed: the token has the one that was drawn."""
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, *[route_over(a=(0, 8))] * 3)
        first = start(walk, swarm, ends, tokenizer, **options)
        for _ in range(cut):
            await anext(first)
        token, before = first.resume_token, first.result
        whole = [each.id async for each in first]
        assert (first.resume_token is None) == (first.result.finish_reason != "length")
        second = resume(walk, swarm, ends, tokenizer, token)
        assert second.prompt == PROMPT
        assert (second.result.text, second.result.token_ids) == (before.text, before.token_ids)
        assert second.resume_token == token
        rest = [each async for each in second]
        assert [each.id for each in rest] == whole
        assert before.text + "".join(each.text for each in rest) == first.result.text
        assert second.result.token_ids == first.result.token_ids
        assert second.result.finish_reason == "length"
        assert second.result.timings.tokens_per_s > 0 or len(rest) == 1
        await swarm.all_closed()


async def test_a_failure_that_is_nobody_s_leaves_the_route_out_and_blames_nobody(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, route_over(a=(0, 8)), route_over(a=(0, 8)))
        generation = start(walk, swarm, ends, tokenizer)
        await anext(generation)

        async def fail(self: Session, hidden: Tensor, position: int, _: object) -> Tensor:
            monkeypatch.undo()
            raise PeerVanished("somebody")

        monkeypatch.setattr(Session, "decode", fail)
        await anext(generation)
        assert walk.asked[1][1] == frozenset({"a"})
        assert walk.outcomes[0][1].failed_peer is None
        await generation.aclose()


async def test_a_pause_longer_than_the_lease_is_nobody_s_fault(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, route_over(a=(0, 8)), route_over(a=(0, 8)))
        generation = start(walk, swarm, ends, tokenizer)
        await anext(generation)

        async def fail(self: Session, hidden: Tensor, position: int, _: object) -> Tensor:
            monkeypatch.undo()
            raise PeerRefused("no step for 300 s", "a", "lease_expired")

        monkeypatch.setattr(Session, "decode", fail)
        await anext(generation)
        assert walk.asked[1][1] == frozenset()
        assert walk.outcomes[0][1].ok
        assert generation.result.failovers == 0
        await generation.aclose()


async def test_a_peer_that_refuses_is_left_out(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        served = await swarm.serve("a")
        served.runner.cache.reserve(served.runner.cache.free_tokens)
        generation = start(Walk(swarm, route_over(a=(0, 8))), swarm, ends, tokenizer)
        with pytest.raises(NoRoute, match=r"the last one failed: the KV cache has 0\.00 GiB") as caught:
            await anext(generation)
        assert isinstance(caught.value.__cause__, PeerRefused)
