"""Texts whose prompts travel packed: a seed gives the same text over hops that are cut at the same blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.client import Client
from p2pinfer.client_config import ClientConfig
from p2pinfer.generation.generation import Generation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.node.transport.line_rate import Line
from p2pinfer.planning.uplink import SLOW_S, Uplink

from .memory_client import NEXT, STORY, OpenClient, forget_texts, three_hops
from .node.memory_swarm import FLOAT32

PACKED = ClientConfig(dtype="float32", draft="off", speculate="off", prefill_codec="int8")
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 11}


@pytest.fixture
def open_client(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenClient:
    return three_hops(checkpoint, monkeypatch, tmp_path)


async def ask(client: Client, prompt: str, tokens: int = 12, **options: Any) -> Generation:
    generation = client.generate(prompt, max_new_tokens=tokens, **(SAMPLED | options))
    async for _ in generation:
        pass
    return generation


@pytest.mark.parametrize("thin", ["off", "on"])
async def test_a_text_is_the_same_each_time_resumed_failed_over_and_guessed_at(
    open_client: OpenClient, thin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(PACKED, thin=thin)
    async with open_client(config=config) as (client, swarm):
        whole = await ask(client, STORY)
        assert whole.result.packed_tokens == whole.result.prompt_tokens - 1
        forget_texts(client)
        part = await ask(client, STORY, 5)
        assert part.resume_token is not None
        forget_texts(client)
        rest = client.resume(part.resume_token, max_new_tokens=7)
        async for _ in rest:
            pass
        assert rest.result.packed_tokens == whole.result.packed_tokens
        assert rest.result.token_ids == whole.result.token_ids
        forget_texts(client)
        # Cut at the same blocks: hidden states are rounded where one hop hands them to the next.
        for name, start, stop in (("d", 0, 3), ("e", 3, 5), ("f", 5, 8)):
            await swarm.serve(name, start, stop, ends=load_embedding_and_head(swarm.checkpoint, FLOAT32))
        disturbed = client.generate(STORY, max_new_tokens=12, **SAMPLED)
        count = 0
        async for _ in disturbed:
            count += 1
            if count == 4:
                await swarm.network.kill(disturbed.result.route[0].peer_id)
        assert disturbed.result.failovers == 1
        assert disturbed.result.token_ids == whole.result.token_ids
    async with open_client(config=replace(config, speculate="4")) as (client, _):
        assert (await ask(client, STORY)).result.token_ids == whole.result.token_ids


async def test_the_next_question_begins_behind_the_prompt_before_it(open_client: OpenClient) -> None:
    """Behind the answer it cannot: that did not travel packed, and as a part of the question it does."""
    async with open_client(config=PACKED) as (client, _):
        first = await ask(client, STORY)
        prompt = STORY + first.result.text + NEXT
        second = await ask(client, prompt)
        said = first.result.prompt_tokens
        assert said - 3 <= second.result.reused_tokens < said
        forget_texts(client)
        anew = await ask(client, prompt)
        assert anew.result.reused_tokens == 0
        assert anew.result.token_ids == second.result.token_ids


async def test_a_text_that_is_not_packed_begins_behind_none_that_is(open_client: OpenClient) -> None:
    async with open_client(config=PACKED) as (client, _):
        packed = await ask(client, STORY)
        client._config = replace(PACKED, prefill_codec="off")  # pyright: ignore[reportPrivateUsage]
        plain = await ask(client, STORY)
        assert (packed.result.packed_tokens > 0, plain.result.packed_tokens) == (True, 0)
        assert plain.result.reused_tokens == 0
        again = await ask(client, STORY)
        assert again.result.reused_tokens >= 64


async def test_hops_that_do_not_take_packed_prompts_are_not_asked_to(open_client: OpenClient) -> None:
    async with open_client(config=PACKED) as (client, swarm):
        swarm.announce("b", 3, 5, packs=False)
        assert (await ask(client, STORY)).result.packed_tokens == 0
        await swarm.serve("d", 3, 5)
        assert (await ask(client, STORY + NEXT)).result.packed_tokens > 0


@pytest.mark.parametrize(("seconds", "is_packed"), [(2 * SLOW_S, True), (SLOW_S / 2, False), (0.0, False)])
async def test_auto_packs_what_would_take_long_on_the_line_as_it_was_found(
    open_client: OpenClient, seconds: float, is_packed: bool
) -> None:
    async with open_client(config=replace(PACKED, prefill_codec="auto")) as (client, _):
        size = len(client.local.tokenizer.encode(STORY)) * 1280
        client._opener.uplink.bytes_per_s = seconds and size / seconds  # pyright: ignore[reportPrivateUsage]
        assert ((await ask(client, STORY)).result.packed_tokens > 0) is is_packed


def test_of_a_line_nothing_is_known_but_what_somebody_waited_for() -> None:
    uplink = Uplink()
    for line in (Line(0.05), Line(0.001, 1e6, 0, 0.001)):
        uplink.note(line)
        assert not uplink.is_slow_for(1 << 40)
    uplink.note(Line(0.05, 1e6, 0, 0.05))
    assert [uplink.is_slow_for(int(each * SLOW_S * 1e6)) for each in (0.9, 1.1)] == [False, True]
