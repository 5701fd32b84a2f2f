"""A client that cannot hold the blocks: opinions of others blame nobody, and raise the rate of audits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
from torch import Tensor

from p2pinfer.audit.auditor import AuditTally
from p2pinfer.audit.verifier import Verifier
from p2pinfer.client_config import AuditConfig
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.reputation.proof import Proof
from p2pinfer.reputation.verdict import Finding, Verdict

from ..node.memory_swarm import MemorySwarm
from .audited_swarm import PROMPT, Change, OpenClient, cheat, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures

THIN = AuditConfig(rate=1.0, memory_bytes=1, linger_s=60.0)


async def serve_all(swarm: MemorySwarm, changes: Sequence[Change | None]) -> None:
    """Peers of the whole model, a, b, ..., the first of which is the one to be used."""
    for name, change in zip("abcdef", changes, strict=False):
        served = await swarm.serve(name, 0, 8, tokens_per_s=1e5 if name == "a" else 1)
        if change is not None:
            cheat(served, change)


def zeroed(output: Tensor) -> Tensor:
    return output * 0


def halved(output: Tensor) -> Tensor:
    return output * 0.5


@pytest.mark.parametrize("opinions", [2, 3])
async def test_an_honest_peer_passes_by_opinions_that_agree_to_the_bit(
    swarm: MemorySwarm, open_client: OpenClient, opinions: int
) -> None:
    await serve_all(swarm, [None] * (opinions + 1))
    async with open_client(audit=THIN) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.audits == AuditTally(done=1, passed=1)
        assert client.ledger.account("a").suspicion == 0


async def test_an_honest_peer_that_rounds_otherwise_passes_too(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """Token by token in bfloat16, while the others agree to the bit in float32."""
    served = await swarm.serve("a", 0, 8, tokens_per_s=1e5)
    run = served.runner.stepwise().run

    def rounded(chunks: Sequence[Chunk], span: BlockSpan | None = None) -> list[Tensor]:
        return [each.bfloat16().to(each.dtype) for each in run(chunks, span)]

    served.runner.run = rounded  # type: ignore[method-assign]
    for name in "bcd":
        await swarm.serve(name, 0, 8, tokens_per_s=1)
    async with open_client(audit=THIN) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.audits == AuditTally(done=1, passed=1)


@pytest.mark.parametrize("lie", [halved, zeroed])
async def test_a_liar_is_suspect_to_it_and_neither_banned_nor_told_of(
    swarm: MemorySwarm, open_client: OpenClient, lie: Change
) -> None:
    await serve_all(swarm, [lie, None, None, None])
    async with open_client(audit=THIN) as client:
        before = client.ledger.account("a").suspicion
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.audits == AuditTally(done=1, suspect=1)
        assert client.ledger.account("a").suspicion > before
        assert not any(map(client.ledger.is_banned, "abcd"))
        assert not client.ledger.proofs()


async def test_two_opinions_against_one_are_not_enough(swarm: MemorySwarm, open_client: OpenClient) -> None:
    await serve_all(swarm, [halved, None, None])
    async with open_client(audit=THIN) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.audits == AuditTally(done=1, inconclusive=1)


async def test_three_liars_make_an_honest_peer_suspect_and_no_more(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    """They answer alike; all that an honest peer loses is that it is looked at more often."""
    await serve_all(swarm, [None, zeroed, zeroed, zeroed])
    async with open_client(audit=THIN) as client:
        for _ in range(2):
            await text_of(client.generate(PROMPT, max_new_tokens=24))
            await client.audits_settled()
        assert client.audits.failed == 0
        assert not client.ledger.is_banned("a")
        assert not client.ledger.proofs()


async def test_a_friend_that_vouches_for_a_liar_does_not_save_it(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    await serve_all(swarm, [halved, halved, None, None, None, None])
    async with open_client(audit=THIN) as client:
        await text_of(client.generate(PROMPT, max_new_tokens=24))
        await client.audits_settled()
        assert client.audits.suspect >= 1
        assert client.ledger.account("a").beta > 1
        assert [client.ledger.account(name).beta for name in "cdef"] == [1] * 4
        assert not any(map(client.ledger.is_banned, "abcdef"))


async def test_what_others_have_found_reaches_it_by_a_vote_and_bans_nobody(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    await serve_all(swarm, [halved, None, None, None])
    unaware = replace(THIN, rate=0.0)
    async with open_client(audit=unaware) as client, open_client() as finder:
        await text_of(client.generate(PROMPT, max_new_tokens=16))
        await text_of(finder.generate(PROMPT, max_new_tokens=16))
        await finder.audits_settled()
        assert finder.ledger.is_banned("a")
        while client.ledger.account("a").beta == 1:  # the swarm's own limit ends it if nothing comes
            await trio.sleep(0.01)
        assert client.ledger.account("a").beta == 1 + client.ledger.config.fail_weight
        assert not any(map(client.ledger.is_banned, "abcd"))
        assert client.ledger.score("a").integrity < client.ledger.score("b").integrity
        assert not client.ledger.score("a").is_newcomer


async def test_a_proof_that_others_do_not_confirm_costs_its_teller_and_nobody_else(
    swarm: MemorySwarm, open_client: OpenClient
) -> None:
    await serve_all(swarm, [None, None, None])
    seen: list[HopRecord] = []

    class Note(Verifier):
        async def verify(self, record: HopRecord) -> Finding:
            seen.append(record)
            return Finding(Verdict.PASS, "")

    async with (
        open_client(audit=replace(THIN, rate=0.0)) as client,
        open_client(verifier=Note()) as slanderer,
    ):
        await text_of(client.generate(PROMPT, max_new_tokens=16))
        await text_of(slanderer.generate(PROMPT, max_new_tokens=16))
        await slanderer.audits_settled()
        [record] = seen
        await slanderer.member.proofs.publish(Proof(1, "a", "output", record.signed), record.contents)
        while client.ledger.account(slanderer.member.peer_id).proofs_false == 0:
            await trio.sleep(0.01)
        assert [client.ledger.account(name).beta for name in "abc"] == [1] * 3
