"""A client without weights: the first hop embeds, the last one draws, and the text is the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from p2pinfer.audit.local_verifier import LocalVerifier
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig
from p2pinfer.errors import ConfigError, LocalError, NoRoute
from p2pinfer.generation.generation import GenerationResult
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head

from .memory_client import open_memory_client
from .node.memory_swarm import FLOAT32, MemorySwarm

PROMPT = "Once upon a time there was a little girl who had a big red ball. She said: I like my big red ball"
SETTINGS: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 7},
    {"temperature": 1.1, "min_p": 0.02, "seed": -3, "logit_bias": {5: 2.0, 260: -4.0}, "min_new_tokens": 20},
]
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7}

OpenClient = Callable[..., AbstractAsyncContextManager[tuple[Client, MemorySwarm]]]


@pytest.fixture(scope="module")
def ends(checkpoint: Checkpoint) -> EmbeddingAndHead:
    return load_embedding_and_head(checkpoint, FLOAT32)


@pytest.fixture
def open_client(
    checkpoint: Checkpoint, ends: EmbeddingAndHead, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> OpenClient:
    """Opens a client in a memory swarm of three hops; the outer ones hold both ends, or what is given."""

    @asynccontextmanager
    async def opened(
        thin: str = "on",
        speculate: str = "off",
        at_hops: Any = ends,
        find_timeout_s: float = 6.0,
        **options: Any,
    ) -> AsyncGenerator[tuple[Client, MemorySwarm]]:
        config = ClientConfig(
            dtype="float32", draft="off", speculate=speculate, thin=thin, find_timeout_s=find_timeout_s
        )
        opening = open_memory_client(checkpoint, monkeypatch, tmp_path, config=config, **options)
        async with opening as (client, swarm):
            for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
                await swarm.serve(name, start, stop, ends=None if name == "b" else at_hops)
            yield client, swarm

    return opened


async def ask(client: Client, prompt: str = PROMPT, **options: Any) -> tuple[GenerationResult, list[Any]]:
    generation = client.generate(prompt, max_new_tokens=24, **options)
    logs = [token.log_probabilities async for token in generation]
    return generation.result, logs


def test_a_client_imports_no_torch() -> None:
    """Nor does any module that it imports; where this fails, `TYPE_CHECKING` or a later import helps."""
    script = "import sys, p2pinfer.client; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "options, speculate",
    [
        (SETTINGS[1], "4"),
        pytest.param(SETTINGS[0], "4", marks=pytest.mark.slow),
        pytest.param(SETTINGS[2], "off", marks=pytest.mark.slow),
    ],
)
async def test_the_text_is_the_one_that_a_client_with_weights_gets(
    open_client: OpenClient, options: dict[str, Any], speculate: str
) -> None:
    async with open_client("off") as (client, _):
        whole, logs = await ask(client, **options)
    async with open_client("on", speculate) as (client, _):
        thin, thin_logs = await ask(client, **options)
        assert client.local.embedding_and_head is None
        with pytest.raises(LocalError, match="holds no weights"):
            _ = client.ends
    assert thin.token_ids == whole.token_ids and thin.text == whole.text
    assert thin.seed == whole.seed
    assert speculate == "off" or (thin.speculation and thin.speculation.drafted)
    for one, other in zip(logs, thin_logs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.token == pytest.approx(other.token, abs=1e-4)
            assert [each for each, _ in one.likeliest] == [each for each, _ in other.likeliest]


@pytest.mark.parametrize(
    "name, span",
    [("c", (5, 8)), pytest.param("a", (0, 3), marks=pytest.mark.slow)],
)
async def test_a_hop_that_fails_is_replaced_in_the_middle_of_a_text(
    open_client: OpenClient, ends: EmbeddingAndHead, name: str, span: tuple[int, int]
) -> None:
    async with open_client("off") as (client, _):
        whole, _ = await ask(client, **DRAWN)
    async with open_client("on", "4") as (client, swarm):
        generation = client.generate(PROMPT, max_new_tokens=24, **DRAWN)
        for _ in range(9):
            await anext(generation)
        await swarm.serve("spare", *span, ends=ends)
        await swarm.network.kill(name)
        async for _ in generation:
            pass
        assert "spare" in {hop.peer_id for hop in generation.result.route}
        assert generation.result.token_ids == whole.token_ids


@pytest.mark.slow
async def test_a_text_that_was_left_goes_on_with_and_without_weights(open_client: OpenClient) -> None:
    async with open_client("off") as (client, _):
        whole, _ = await ask(client, **DRAWN)
        begun = client.generate(PROMPT, max_new_tokens=24, **DRAWN)
        for _ in range(9):
            await anext(begun)
        await begun.aclose()
    token = begun.resume_token
    for thin in ("on", "off"):
        assert token is not None
        async with open_client(thin) as (client, _):
            rest = client.resume(token)
            for _ in range(5):
                await anext(rest)
            await rest.aclose()
            token = rest.resume_token
            if thin == "off":
                async for _ in (last := client.resume(token or "")):
                    pass
                assert last.result.token_ids == whole.token_ids


@pytest.mark.slow
async def test_the_next_question_begins_behind_the_last_answer(open_client: OpenClient) -> None:
    async with open_client() as (client, _):
        first, _ = await ask(client, PROMPT * 4, **DRAWN)
        question = PROMPT * 4 + first.text + " Then"
        second, _ = await ask(client, question, **DRAWN)
        assert second.reused_tokens >= 64
    async with open_client("off") as (client, _):
        alone, _ = await ask(client, question, **DRAWN)
    assert alone.token_ids == second.token_ids


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3}, {"grammar": '{"type": "object"}'}]
)
async def test_what_looks_at_the_text_is_refused(open_client: OpenClient, options: dict[str, Any]) -> None:
    async with open_client() as (client, _):
        with pytest.raises(ConfigError, match="--thin"):
            client.generate(PROMPT, **options)


async def test_peers_that_lack_embedding_and_head_are_told_from_none(
    open_client: OpenClient,
) -> None:
    async with open_client(at_hops=None, find_timeout_s=0.01) as (client, swarm):
        with pytest.raises(NoRoute, match="blocks 0:3, 5:8 are served only by peers that do not hold"):
            await ask(client)
        for name, start, stop in (("a", 0, 3), ("c", 5, 8)):
            swarm.announce(name, start, stop, ends=True)
        with pytest.raises(NoRoute, match="neither embedding nor head"):
            await ask(client)


class AnotherToken:
    """Ends of a hop that lies: it never gives the likeliest token, or embeds another one."""

    def __init__(self, ends: EmbeddingAndHead, *, draws: bool) -> None:
        self._ends = ends
        self._draws = draws

    def embed(self, token_ids: list[int]) -> Tensor:
        return self._ends.embed(token_ids if self._draws else [*token_ids[:-1], (token_ids[-1] + 1) % 1000])

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._ends.logits(hidden)
        return logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf) if self._draws else logits


@pytest.mark.parametrize(
    "liar, options",
    [
        ("c", DRAWN),
        pytest.param("nobody", DRAWN, marks=pytest.mark.slow),
        pytest.param("a", {}, marks=pytest.mark.slow),
    ],
)
async def test_a_hop_that_embeds_or_draws_another_token_is_banned(
    open_client: OpenClient, ends: EmbeddingAndHead, tmp_path: Path, liar: str, options: dict[str, Any]
) -> None:
    config = AuditConfig(rate=1.0, memory_bytes=1 << 30)
    verifier = LocalVerifier(resolve_model(BUNDLED_MODEL, cache_dir=tmp_path), config)
    lying = ends if liar == "nobody" else AnotherToken(ends, draws=liar == "c")
    async with open_client(at_hops=cast(EmbeddingAndHead, lying), audit=config, verifier=verifier) as opened:
        client, _ = opened
        await ask(client, **options)
        await client.audits_settled()
        banned = {peer for peer in ("a", "b", "c") if client.ledger.is_banned(peer)}
        assert banned == {liar} - {"nobody"}
        assert client.audits.done == 3 and client.audits.failed == len(banned)
        bans = [client.ledger.account(peer).ban for peer in banned]
        assert all(ban is not None and ban.by == "audits" for ban in bans)  # and not by the user
