"""The next question of a chat begins behind the last answer, on the same hops."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2pinfer.client import Client
from p2pinfer.client_config import ClientConfig
from p2pinfer.generation.generation import Generation
from p2pinfer.models.checkpoint.checkpoint import Checkpoint

from .memory_client import open_memory_client
from .node.memory_swarm import MemorySwarm

STORY = "Once upon a time there was a little girl who had a big red ball. " * 5
NEXT = " The next day, her mom said"
PLAIN = ClientConfig(dtype="float32", draft="off", speculate="off")

OpenClient = Callable[..., AbstractAsyncContextManager[tuple[Client, MemorySwarm]]]


@pytest.fixture
def open_client(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenClient:
    """Opens a client in a memory swarm of three hops."""

    @asynccontextmanager
    async def opened(**options: Any) -> AsyncGenerator[tuple[Client, MemorySwarm]]:
        async with open_memory_client(checkpoint, monkeypatch, tmp_path, **options) as (client, swarm):
            for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
                await swarm.serve(name, start, stop)
            yield client, swarm

    return opened


async def finished(generation: Generation) -> Generation:
    async for _ in generation:
        pass
    return generation


async def ask(client: Client, prompt: str, **options: Any) -> Generation:
    return await finished(client.generate(prompt, max_new_tokens=12, **options))


def forget(client: Client) -> None:
    """Let the next text begin without those before it."""
    client._kept_texts._texts.clear()  # pyright: ignore[reportPrivateUsage]


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
        forget(client)
        anew = await ask(client, prompt, **options)
        assert anew.result.reused_tokens == 0
        assert anew.result.token_ids == second.result.token_ids


async def test_several_answers_to_one_prompt_share_its_prefill(open_client: OpenClient) -> None:
    async with open_client(config=PLAIN) as (client, _):
        answers = [await ask(client, STORY, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
        forget(client)
        anew = [await ask(client, STORY, temperature=1.0, seed=seed) for seed in (1, 2, 3)]
        assert [each.result.token_ids for each in answers] == [each.result.token_ids for each in anew]
        assert answers[0].result.reused_tokens == 0
        assert all(each.result.reused_tokens >= 64 for each in answers[1:])


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
