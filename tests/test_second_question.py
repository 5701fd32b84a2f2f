"""The next question of a chat begins behind the last answer, on the same hops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from p2pinfer.client import Client
from p2pinfer.client_config import ClientConfig
from p2pinfer.generation.generation import Generation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.events import SessionClosed

from .memory_client import NEXT, STORY, OpenClient, forget_texts, three_hops

PLAIN = ClientConfig(dtype="float32", draft="off", speculate="off")


@pytest.fixture
def open_client(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenClient:
    return three_hops(checkpoint, monkeypatch, tmp_path)


async def finished(generation: Generation) -> Generation:
    async for _ in generation:
        pass
    return generation


async def ask(client: Client, prompt: str, **options: Any) -> Generation:
    return await finished(client.generate(prompt, max_new_tokens=12, **options))


@pytest.mark.parametrize(
    "config, options",
    [
        (PLAIN, {"temperature": 0.8, "seed": 11}),
        (replace(PLAIN, draft="auto", speculate="auto"), {"temperature": 0.0}),
    ],
    ids=["sampled", "with drafts"],
)
async def test_the_next_question_begins_behind_the_last_answer(
    open_client: OpenClient, config: ClientConfig, options: dict[str, Any]
) -> None:
    async with open_client(config=config) as (client, _):
        first = await ask(client, STORY, **options)
        prompt = STORY + first.result.text + NEXT
        second = await ask(client, prompt, **options)
        said = len(client.local.tokenizer.encode(STORY)) + len(first.result.token_ids)
        assert said - 12 <= second.result.reused_tokens < said  # tokens at the joints may be others
        forget_texts(client)
        anew = await ask(client, prompt, **options)
        assert anew.result.reused_tokens == 0
        assert anew.result.token_ids == second.result.token_ids


async def test_several_answers_to_one_prompt_share_its_prefill(open_client: OpenClient) -> None:
    async with open_client(config=PLAIN) as (client, _):
        answers = [await ask(client, STORY, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
        forget_texts(client)
        anew = [await ask(client, STORY, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
        assert [each.result.token_ids for each in answers] == [each.result.token_ids for each in anew]
        assert answers[0].result.reused_tokens == 0
        assert all(each.result.reused_tokens >= 64 for each in answers[1:])


async def at_once(client: Client, *seeds: int) -> list[Generation]:
    """Samples of one prompt that share its prefill, all at once."""
    texts = [client.generate(STORY, max_new_tokens=12, temperature=1.0, seed=seed) for seed in seeds]
    texts[0].share_prefill(*texts[1:])
    async with trio.open_nursery() as nursery:
        for each in texts:
            nursery.start_soon(finished, each)
    return texts


@pytest.mark.parametrize("config", [PLAIN, replace(PLAIN, thin="on")], ids=["with weights", "without"])
async def test_samples_at_once_have_their_prompt_computed_once(
    open_client: OpenClient, config: ClientConfig
) -> None:
    seeds = (1, 2, 3, 4)
    async with open_client(config=config) as (client, swarm):
        samples = await at_once(client, *seeds)
        prompt = samples[0].result.prompt_tokens
        assert all(64 <= each.result.reused_tokens < prompt for each in samples)  # whole pages are shared
        while any(each.server.sessions for each in swarm.served.values()):
            await trio.lowlevel.checkpoint()
        computed = sum(event.tokens for event in swarm.events if isinstance(event, SessionClosed))
        assert 3 * prompt <= computed <= 3 * (prompt + (prompt - 64 + 12) * len(seeds))
        forget_texts(client)
        alone = [await ask(client, STORY, temperature=1.0, seed=seed) for seed in seeds]
        assert [each.result.token_ids for each in samples] == [each.result.token_ids for each in alone]


async def test_samples_compute_their_prompts_where_no_hop_keeps_one(open_client: OpenClient) -> None:
    async with open_client(config=PLAIN) as (client, swarm):
        await swarm.network.kill("b")
        await swarm.serve("d", 3, 5, config=ServeConfig(prefix_keep_s=0.5))
        samples = await at_once(client, 1, 2)
        assert [each.result.reused_tokens for each in samples] == [0, 0]
        alone = [await ask(client, STORY, temperature=1.0, seed=seed) for seed in (1, 2)]
        assert [each.result.token_ids for each in samples] == [each.result.token_ids for each in alone]


@pytest.mark.parametrize("victim", ["a", "c"])
async def test_a_hop_that_dies_behind_a_prefix_is_replaced(open_client: OpenClient, victim: str) -> None:
    async with open_client(config=PLAIN) as (client, swarm):
        first = await ask(client, STORY)
        prompt = STORY + first.result.text + NEXT
        undisturbed = (await ask(client, prompt)).result.token_ids
        blocks = {"a": (0, 3), "b": (3, 5), "c": (5, 8)}[victim]
        await swarm.serve("spare", *blocks, tokens_per_s=1.0)
        generation = client.generate(prompt, max_new_tokens=12)
        for _ in range(3):
            await anext(generation)
        assert generation.result.reused_tokens > 64
        await swarm.network.kill(victim)
        await finished(generation)
        assert generation.result.token_ids == undisturbed
        assert generation.result.failovers == 1
        assert "spare" in [hop.peer_id for hop in generation.result.route]
        # The hops of that session are others than at its beginning, so the next one begins anew.
        assert (await ask(client, prompt)).result.token_ids == undisturbed


async def test_a_prefix_on_a_hop_that_is_gone_costs_nothing_but_the_prefill(open_client: OpenClient) -> None:
    async with open_client(config=PLAIN) as (client, swarm):
        first = await ask(client, STORY)
        prompt = STORY + first.result.text + NEXT
        undisturbed = (await ask(client, prompt)).result.token_ids
        await swarm.serve("spare", 3, 5)
        await swarm.network.kill("b")
        again = await ask(client, prompt)
        assert again.result.token_ids == undisturbed
        assert again.result.reused_tokens == 0


async def test_a_route_that_is_much_better_is_taken_without_the_prefix(open_client: OpenClient) -> None:
    async with open_client(config=PLAIN) as (client, swarm):
        await ask(client, STORY)
        await swarm.serve("all", 0, 8, tokens_per_s=5000.0)
        again = await ask(client, STORY)
        assert [hop.peer_id for hop in again.result.route] == ["all"]
        assert again.result.reused_tokens == 0
