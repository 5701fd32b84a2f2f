"""Audits of sessions that begin with another one, which cover the beginning too."""

from __future__ import annotations

import pytest
import trio

from p2pinfer.audit.auditor import AuditTally
from p2pinfer.client import Client

from ..node.memory_swarm import MemorySwarm, Served
from .audited_swarm import OpenClient, cheat, noisy, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures

STORY = "Once upon a time there was a little girl who had a big red ball. " * 5


async def serve(swarm: MemorySwarm) -> dict[str, Served]:
    spans = {"a": (0, 3), "b": (3, 5), "c": (5, 8)}
    return {name: await swarm.serve(name, *span) for name, span in spans.items()}


async def answered(client: Client) -> str:
    answer = await text_of(client.generate(STORY, max_new_tokens=12))
    await client.audits_settled()
    return STORY + answer + " The next day"


async def test_honest_hops_pass_with_a_prefix_as_without(swarm: MemorySwarm, open_client: OpenClient) -> None:
    await serve(swarm)
    async with open_client() as client:
        generation = client.generate(await answered(client), max_new_tokens=24)
        await text_of(generation)
        assert generation.result.reused_tokens > 64
        await client.audits_settled()
        assert client.audits == AuditTally(done=6, passed=6)
        assert {client.ledger.account(name).passed for name in "abc"} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("cheater", ["a", "c"])
async def test_who_begins_to_cheat_behind_a_prefix_is_banned_everywhere(
    swarm: MemorySwarm, open_client: OpenClient, cheater: str
) -> None:
    served = await serve(swarm)
    async with open_client() as stranger, open_client() as client:
        prompt = await answered(client)
        assert client.audits == AuditTally(done=3, passed=3)
        cheat(served[cheater], noisy)
        generation = client.generate(prompt, max_new_tokens=24)
        await text_of(generation)
        assert generation.result.reused_tokens > 64
        await client.audits_settled()
        assert [name for name in "abc" if client.ledger.is_banned(name)] == [cheater]
        with trio.fail_after(30):
            while not stranger.ledger.is_banned(cheater):
                await trio.sleep(0.01)


async def test_who_kept_another_cache_than_it_signed_for_is_banned(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """Its keys and values of the prefix are spoilt; what it computes behind them is as its blocks give it."""
    served = await serve(swarm)
    async with open_client() as client:
        prompt = await answered(client)
        cache = served["b"].runner.cache
        for keys in cache.pools[0].view(0, 128)[0]:
            keys.mul_(0.5)
        await text_of(client.generate(prompt, max_new_tokens=24))
        await client.audits_settled()
        assert [name for name in "abc" if client.ledger.is_banned(name)] == ["b"]
