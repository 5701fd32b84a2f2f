"""Generations over real blocks: what they give, and what becomes of them when hops fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.client_config import SessionConfig
from p2pinfer.errors import (
    ConfigError,
    NoRoute,
    PeerRefused,
    PeerUnreachable,
    PeerVanished,
    PromptTooLong,
    Unfinished,
)
from p2pinfer.generation import remote_blocks
from p2pinfer.generation.draft_model import DraftModel
from p2pinfer.generation.first_state import check_lengths
from p2pinfer.generation.generation import Generation, GenerationConfig, Token, generation_config, new_state
from p2pinfer.generation.outage import RetryLimits, Waiting
from p2pinfer.generation.remote_blocks import HopUsed
from p2pinfer.generation.saved_state import decode_state
from p2pinfer.generation.speculation import Speculation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.compute.runner import Chunk, open_runner
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.sampling import Sampler, SamplingConfig
from p2pinfer.models.text.text import Tokenizer
from p2pinfer.routing.route import Route, RouteOutcome
from p2pinfer.session.chain import ReplaySource
from p2pinfer.session.hosting import open_session, start_session
from p2pinfer.session.session import Session

from ..node.memory_swarm import FLOAT32, MemorySwarm, open_memory_swarm, route_over

PROMPT = "Once upon a time"


def local_ids(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, prompt_ids: list[int], count: int, seed: int
) -> list[int]:
    """What one machine generates: greedily, or with a seed above 0."""
    sampler = Sampler(SamplingConfig(temperature=1.0 if seed else 0.0, seed=seed))
    runner = open_runner(checkpoint, BlockSpan(0, 8), FLOAT32)
    lease = runner.cache.reserve(len(prompt_ids) + count)
    ids, new = list(prompt_ids), list(prompt_ids)
    for _ in range(count):
        (hidden,) = runner.run([Chunk(lease, len(ids) - len(new), ends.embed(new))])
        new = [sampler.pick(ends.logits(hidden)[-1], len(ids))]
        ids += new
    return ids[len(prompt_ids) :]


class Walk:
    """Opens sessions over the routes it was given, one after the other."""

    def __init__(self, swarm: MemorySwarm, *routes: Route) -> None:
        self.asked: list[tuple[int, frozenset[str]]] = []
        self.outcomes: list[tuple[Route, RouteOutcome]] = []
        self.chunk_tokens = 3
        self._swarm = swarm
        self._host = swarm.network.host("client")
        self._routes = list(routes)

    @property
    def table_changed(self) -> trio.Event:
        return self._swarm.view.changed

    def offer(self, *routes: Route) -> None:
        """Have further routes from now on; the announcement that brings them is news."""
        self._routes += routes

    async def open_session(
        self, tokens: int, excluded: frozenset[str], replay_source: ReplaySource
    ) -> Session:
        self.asked.append((tokens, excluded))
        if not self._routes:
            raise NoRoute("no route: nobody serves blocks 0:8", [(0, 8)])
        return await start_session(
            self._swarm.network.nursery,
            open_session(
                self._host,
                self._routes.pop(0),
                self._swarm.spec,
                max_tokens=tokens,
                codec="float32",
                config=SessionConfig(chunk_tokens=self.chunk_tokens),
            ),
        )

    def route_ended(self, route: Route, outcome: RouteOutcome) -> None:
        self.outcomes.append((route, outcome))

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"]:
        return "relayed" if peer_id == "b" else "direct"


def start(
    walk: Walk,
    swarm: MemorySwarm,
    ends: EmbeddingAndHead,
    tokenizer: Tokenizer,
    prompt: str = PROMPT,
    *,
    retry_limits: RetryLimits | None = None,
    speculation: Speculation | None = None,
    draft_model: DraftModel | None = None,
    expected_s: Callable[[Route], float | None] = lambda _: None,
    on_wait: Callable[[Waiting], None] = lambda _: None,
    **options: Any,
) -> Generation:
    options.setdefault("max_new_tokens", 10)
    state = new_state(swarm.spec, tokenizer, prompt, GenerationConfig(**options))
    return Generation(
        walk,
        swarm.spec,
        ends,
        tokenizer,
        state,
        retry_limits=retry_limits,
        speculation=speculation,
        draft_model=draft_model,
        expected_s=expected_s,
        on_wait=on_wait,
    )


def resume(
    walk: Walk, swarm: MemorySwarm, ends: EmbeddingAndHead, tokenizer: Tokenizer, token: str | None
) -> Generation:
    """As another process would."""
    assert token is not None
    return Generation(walk, swarm.spec, ends, tokenizer, decode_state(token))


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
            expected_s=lambda route: 100.0 * len(route.hops),
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

        async def fail(self: Session, hidden: Tensor, position: int) -> Tensor:
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

        async def fail(self: Session, hidden: Tensor, position: int) -> Tensor:
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


def force(monkeypatch: pytest.MonkeyPatch, ends: EmbeddingAndHead, ids: list[int]) -> None:
    """Let the head favour these tokens, one after the other."""
    coming = iter(ids)

    def logits(hidden: Tensor) -> Tensor:
        chosen = torch.zeros(1, ends.spec.vocab_size)
        chosen[0, next(coming)] = 1.0
        return chosen

    monkeypatch.setattr(ends, "logits", logits)


def encode_as(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Let every text be these tokens."""

    def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ids

    monkeypatch.setattr(tokenizer, "encode", encode)


async def test_an_end_of_text_ends_it_and_is_no_text(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (eos,) = tokenizer.eos_ids
    words = tokenizer.encode(" there was")[-2:]
    force(monkeypatch, ends, [*words, eos])
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        generation = start(Walk(swarm, route_over(a=(0, 8))), swarm, ends, tokenizer)
        tokens = [token async for token in generation]
        assert tokens[-1] == Token(eos, "")
        assert (generation.result.text, generation.result.finish_reason) == (tokenizer.decode(words), "eos")
        await swarm.all_closed()


async def test_a_prompt_that_does_not_fit_is_refused_at_once(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        with pytest.raises(
            PromptTooLong, match="tokens long, but the context of tiny-stories is 1024 tokens"
        ):
            start(Walk(swarm), swarm, ends, tokenizer, "word " * 1200)


def test_a_prompt_is_limited_where_its_length_would_turn_its_tokens(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    spec = replace(checkpoint.spec, prompt_limit=20)
    short, long = "word " * 8, "word " * 30
    state = new_state(spec, tokenizer, short, GenerationConfig(max_new_tokens=100))
    assert len(state.prompt_ids) <= 20 < len(state.prompt_ids) + state.max_new_tokens
    with pytest.raises(PromptTooLong, match="takes prompts of up to 20: in a longer one its rotary"):
        new_state(spec, tokenizer, long, GenerationConfig())
    check_lengths(spec, spec.max_positions, 20)
    with pytest.raises(PromptTooLong, match="takes prompts of up to 20: in a longer one its rotary"):
        check_lengths(spec, 21, 21)


async def test_of_a_prompt_that_is_far_too_long_a_beginning_is_looked_at(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten megabytes are a second or more of tokenizing; a long text of few tokens is looked at whole."""
    looked_at: list[int] = []
    encode = tokenizer.encode

    def spy(text: str, *, add_special_tokens: bool = True) -> list[int]:
        looked_at.append(len(text))
        if text.startswith("long"):
            return [7]
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", spy)
    async with open_memory_swarm(checkpoint) as swarm:
        with pytest.raises(PromptTooLong, match=r"the prompt is over \d+ tokens long"):
            start(Walk(swarm), swarm, ends, tokenizer, "word " * 2_000_000)
        assert looked_at == [16 * 1024]
        start(Walk(swarm), swarm, ends, tokenizer, "long" * 10_000)
        assert looked_at[1:] == [16 * 1024, 40_000]


@pytest.mark.parametrize("options", [{"prompt": "caf\udce9"}, {"stop": ("\ud83d",)}])
async def test_half_a_character_is_refused_where_it_is_given(
    options: dict[str, Any], checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        with pytest.raises(ConfigError, match="half of a surrogate pair"):
            start(Walk(swarm), swarm, ends, tokenizer, **options)


async def test_an_empty_prompt_is_a_text_from_its_beginning_where_a_token_marks_that(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled model's tokenizer puts one there; not all do."""
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        generation = start(Walk(swarm, route_over(a=(0, 8))), swarm, ends, tokenizer, "", max_new_tokens=4)
        assert [token.id async for token in generation] == local_ids(checkpoint, ends, [1], 4, seed=0)
        assert (generation.prompt, generation.result.text) == ("", "Once upon a time")
        await swarm.all_closed()
        encode_as(monkeypatch, tokenizer, [])
        with pytest.raises(ConfigError, match="the prompt is empty and tiny-stories has no start token"):
            start(Walk(swarm), swarm, ends, tokenizer, "")


async def test_a_long_prompt_leaves_room_for_what_fits(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_as(monkeypatch, tokenizer, [5] * 1022)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, route_over(a=(0, 8)))
        generation = start(walk, swarm, ends, tokenizer)
        async for _ in generation:
            pass
        result = generation.result
        assert (len(result.token_ids), result.prompt_tokens, result.finish_reason) == (2, 1022, "length")
        assert walk.asked == [(1024, frozenset())]


async def test_one_that_is_left_early_frees_what_the_hops_hold(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, route_over(a=(0, 8)), route_over(a=(0, 8)))
        generation = start(walk, swarm, ends, tokenizer)
        await anext(generation)
        await generation.aclose()
        await generation.aclose()
        await swarm.all_closed()
        assert [outcome.ok for _, outcome in walk.outcomes] == [True]
        await anext(generation)  # who goes on after all gets a new session
        assert len(walk.asked) == 2
        await generation.aclose()
        await swarm.all_closed()


async def test_one_that_is_cancelled_frees_what_the_hops_hold(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        generation = start(Walk(swarm, route_over(a=(0, 8))), swarm, ends, tokenizer)
        await anext(generation)
        with trio.CancelScope() as scope:
            scope.cancel()
            await anext(generation)
        assert scope.cancelled_caught
        await swarm.all_closed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"stop": "The end"}, "stop is 'The end'; it must be a list of texts"),
        ({"seed": 1 << 63}, "it must fit into 64 bits"),
    ],
)
def test_what_makes_no_sense_cannot_be_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**options)


def test_single_fields_of_a_generation_can_be_replaced() -> None:
    config = GenerationConfig(temperature=0.5)
    assert generation_config(config, {"seed": 3}) == GenerationConfig(temperature=0.5, seed=3)
    assert generation_config(None, {}) == GenerationConfig()
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'temprature'.*GenerationConfig"):
        generation_config(None, {"temprature": 1.0})
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generation_config(None, {"max_new_tokens": 0})
    with pytest.raises(ConfigError, match="max_new_tokens is 'many'; it must be a whole number"):
        generation_config(None, {"max_new_tokens": "many"})


async def test_a_text_begins_with_the_room_there_is_and_goes_on_when_there_is_more(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    async with open_memory_swarm(checkpoint) as swarm:
        served = await swarm.serve("a")
        cache = served.runner.cache
        taken = cache.reserve(cache.free_tokens - 192)  # of what is left one client may have 128
        walk = Walk(swarm, *[route_over(a=(0, 8))] * 4)
        generation = start(walk, swarm, ends, tokenizer, max_new_tokens=200, temperature=1.0, seed=2)
        ids = [(await anext(generation)).id for _ in range(100)]
        assert [tokens for tokens, _ in walk.asked] == [205, 128]
        taken.release()
        ids += [token.id async for token in generation]
        assert [tokens for tokens, _ in walk.asked] == [205, 128, 205]
        assert ids == local_ids(checkpoint, ends, tokenizer.encode(PROMPT), len(ids), seed=2)
        assert all(outcome.ok for _, outcome in walk.outcomes)
        await swarm.all_closed()


async def test_a_text_that_finds_no_more_room_ends_with_a_token_to_go_on_from(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer
) -> None:
    """It holds nothing meanwhile: two that want to grow cannot wait for each other."""
    async with open_memory_swarm(checkpoint) as swarm:
        served = await swarm.serve("a")
        cache = served.runner.cache
        taken = cache.reserve(cache.free_tokens - 192)
        free = cache.free_tokens
        walk = Walk(swarm, *[route_over(a=(0, 8))] * 9)
        generation = start(
            walk,
            swarm,
            ends,
            tokenizer,
            max_new_tokens=200,
            temperature=1.0,
            seed=2,
            retry_limits=RetryLimits(0, 0),
        )
        ids: list[int] = []
        with pytest.raises(Unfinished, match="does not fit, one of 128 would") as caught:
            async for token in generation:
                ids.append(token.id)
        assert len(ids) == 128 - 5 + 1
        while (cache.free_tokens, served.server.sessions) != (free, 0):  # the worker gives pages back
            await trio.lowlevel.checkpoint()
        taken.release()
        rest = resume(Walk(swarm, route_over(a=(0, 8))), swarm, ends, tokenizer, caught.value.resume_token)
        ids += [token.id async for token in rest]
        assert ids == local_ids(checkpoint, ends, tokenizer.encode(PROMPT), len(ids), seed=2)


async def test_a_long_text_reserves_ahead_of_itself_and_not_to_its_end(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_blocks, "_AHEAD_TOKENS", 10)
    async with open_memory_swarm(checkpoint) as swarm:
        await swarm.serve("a")
        walk = Walk(swarm, *[route_over(a=(0, 8))] * 4)
        generation = start(walk, swarm, ends, tokenizer, max_new_tokens=60)
        ids = [token.id async for token in generation]
        assert [tokens for tokens, _ in walk.asked] == [15, 32, 65]
        assert ids == local_ids(checkpoint, ends, tokenizer.encode(PROMPT), 60, seed=0)
