"""The ids that transformers gives: over every split, in every family, with others about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import trio
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel

from p2pinfer.client import Client
from p2pinfer.client_config import SessionConfig
from p2pinfer.models.text.text import Tokenizer, load_tokenizer

from ..clear import clear_choices
from .support import Swarm, open_nodes, prompt_of, text_of

pytestmark = pytest.mark.slow

Oracle = Callable[..., PreTrainedModel]

NEW_TOKENS = 12
SPLITS = [(0, 8), (0, 3, 8), (0, 1, 6, 8), (0, 2, 3, 7, 8)]
LENGTHS = (1, 2, 33, 256, 257, 700)


def expected_ids(model: PreTrainedModel, ids: list[int], tokens: int) -> tuple[int, ...]:
    """What transformers generates greedily."""
    generate: Any = model.generate
    batch = torch.tensor([ids])
    with torch.inference_mode():
        output = generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return tuple(output[0, len(ids) :].tolist())


def logits_of(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """transformers' logits after each of `ids`, (tokens, vocab_size) float32."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits
    return logits[0].float()


def hops(boundaries: Sequence[int], first_peer: int = 0) -> list[tuple[int, int, int]]:
    """Every span of a split on a peer of its own."""
    return [((first_peer + index) % 4, *span) for index, span in enumerate(pairwise(boundaries))]


async def generate_all(client: Client, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The ids of several prompts, generated at the same time."""
    ids: dict[str, tuple[int, ...]] = {}

    async def generate(prompt: str) -> None:
        generation = client.generate(prompt, max_new_tokens=NEW_TOKENS)
        await text_of(generation)
        ids[prompt] = generation.result.token_ids

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(generate, prompt)
    return ids


@pytest.fixture(scope="module")
def told_by_transformers(
    tiny_stories: Path, tokenizer: Tokenizer, oracle: Oracle
) -> dict[str, tuple[int, ...]]:
    """Greedy ids for prompts of all lengths."""
    model = oracle(tiny_stories)
    prompts = [prompt_of(tokenizer, tokens) for tokens in LENGTHS]
    return {prompt: expected_ids(model, tokenizer.encode(prompt), NEW_TOKENS) for prompt in prompts}


@pytest.mark.parametrize("boundaries", SPLITS, ids=str)
async def test_greedy_ids_are_those_of_transformers_over_processes(
    boundaries: tuple[int, ...], swarm: Swarm, told_by_transformers: dict[str, tuple[int, ...]]
) -> None:
    """Prompts of 1 to 700 tokens at the same time, each in chunks that follow each other without waiting."""
    way = hops(boundaries)
    async with swarm.client(*way, session=SessionConfig(chunk_tokens=100, chunks_in_flight=3)) as client:
        assert await generate_all(client, list(told_by_transformers)) == told_by_transformers
        generation = client.generate("Once upon a time", max_new_tokens=1)
        await text_of(generation)
        assert [(hop.peer_id, hop.span.start, hop.span.stop) for hop in generation.result.route] == [
            (swarm.peers[peer], start, stop) for peer, start, stop in way
        ]


async def test_clients_on_crossing_ways_do_not_disturb_each_other(
    swarm: Swarm, told_by_transformers: dict[str, tuple[int, ...]]
) -> None:
    """Every node is first hop of one client, and another one's last."""
    prompts = [prompt for prompt in told_by_transformers if prompt][:3]

    async def use(first_peer: int) -> None:
        async with swarm.client(*hops(SPLITS[3], first_peer)) as client:
            for prompt, ids in (await generate_all(client, prompts)).items():
                assert ids == told_by_transformers[prompt]

    async with trio.open_nursery() as nursery:
        for first_peer in range(4):
            nursery.start_soon(use, first_peer)


def write_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer of words: `w7` is token 7."""
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{n}": n for n in range(words)}, unk_token="w3"))
    anything: Any = backend
    anything.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    anything.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        "mixtral",
        *(pytest.param(each, marks=pytest.mark.sweep) for each in ("llama", "mistral", "qwen2", "qwen3")),
    ],
)
async def test_greedy_ids_are_those_of_transformers_in_every_family(
    family: str, write_checkpoint: Callable[..., Path], oracle: Oracle, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / family, family)
    write_tokenizer(folder, 199)
    model = oracle(folder)
    expected: dict[str, tuple[int, ...]] = {}
    for tokens in (1, 60, 700):
        ids = [(index * index + 5 * index + tokens) % 190 + 5 for index in range(tokens)]
        prompt = " ".join(f"w{token_id}" for token_id in ids)
        assert load_tokenizer(folder).encode(prompt) == ids
        expected[prompt] = expected_ids(model, ids, NEW_TOKENS)
    async with open_nodes(folder, tmp_path, [(0, 4)] * 4) as nodes:
        for boundaries, chunk_tokens in (
            ((0, 4), 256),
            ((0, 1, 4), 300),
            ((0, 2, 3, 4), 70),
            ((0, 1, 2, 3, 4), 33),
        ):
            session = SessionConfig(chunk_tokens=chunk_tokens)
            async with nodes.client(*hops(boundaries), session=session) as client:
                assert await generate_all(client, list(expected)) == expected


async def teacher_forced(client: Client, ids: list[int], prefill: int, hops: int) -> Tensor:
    """Logits after each of `ids`, of which all but the first `prefill` are decoded one by one."""
    while len(client.peers()) < hops:
        await client.member.table_changed.wait()
    session = await client.open_session(len(ids), frozenset())
    embedded = client.ends.embed(ids)
    hidden = [await session.decode(embedded[:prefill], 0)]
    hidden += [await session.decode(embedded[at : at + 1], at) for at in range(prefill, len(ids))]
    await session.aclose()
    return client.ends.logits(torch.cat(hidden))


@pytest.mark.parametrize(
    ("model", "boundaries"),
    [
        ("tiny_stories", (0, 3, 7, 8)),
        pytest.param("smollm2", (0, 11, 30), marks=pytest.mark.sweep),
    ],
)
async def test_bfloat16_ids_are_those_of_transformers_wherever_the_margin_is_clear(
    model: str, boundaries: tuple[int, ...], request: pytest.FixtureRequest, oracle: Oracle, tmp_path: Path
) -> None:
    """Each step is given transformers' own ids, so that a close call does not void what follows it."""
    folder: Path = request.getfixturevalue(model)
    reference = oracle(folder)
    start = load_tokenizer(folder).encode("Once upon a time there was a little fox who lived in the forest.")
    ids = [*start, *expected_ids(reference, start, 60)]
    clear = clear_choices(logits_of(reference, ids), logits_of(oracle(folder, torch.bfloat16), ids))
    assert clear.mask.sum() > len(ids) / 4
    async with open_nodes(folder, tmp_path, list(pairwise(boundaries)), dtype="bfloat16") as nodes:
        way = [(index, *span) for index, span in enumerate(pairwise(boundaries))]
        async with nodes.client(*way, dtype="bfloat16") as client:
            logits = await teacher_forced(client, ids, len(start), len(way))
    assert torch.equal(logits.argmax(-1)[clear.mask], clear.ids[clear.mask])
