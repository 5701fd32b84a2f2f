"""What bounds a text: its end, its prompt, and the room at the hops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from p2pinfer.errors import (
    ConfigError,
    PromptTooLong,
    Unfinished,
)
from p2pinfer.generation import remote_blocks
from p2pinfer.generation.first_state import check_lengths
from p2pinfer.generation.generation import GenerationConfig, Token, generation_config, new_state
from p2pinfer.generation.outage import RetryLimits
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.text.text import Tokenizer

from ..node.memory_swarm import open_memory_swarm, route_over
from .texts import PROMPT, Walk, local_ids, resume, start


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
