"""Audits of prompts that travelled packed: limits as they are, and nothing hides behind the rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from p2pinfer.audit.auditor import AuditTally
from p2pinfer.audit.opinions import judge_by_opinions
from p2pinfer.client_config import ClientConfig
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.packed_rows import rounded_rows
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.models.verify.reference import open_reference
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.node.evidence.check import check_span
from p2pinfer.node.evidence.hop_record import History
from p2pinfer.reputation.verdict import Verdict

from ..node.memory_swarm import MemorySwarm
from .audited_swarm import OpenClient, cheat, noisy, open_client, swarm, text_of

__all__ = ["open_client", "swarm"]  # fixtures

STORY = "Once upon a time there was a little girl who had a big red ball. " * 5
PACKED = ClientConfig(dtype="float32", prefill_codec="int8")
TEXT = (  # which does not repeat itself
    "Once upon a time, there was a little fox who lived in a big forest. He had a red ball and he liked to "
    "play with it every day. One day, the ball fell into the river. The fox was sad and he began to cry. A "
    "duck saw him and said, 'Why are you sad, little fox?' The fox said, 'My ball is in the river and I can "
    "not swim.' The duck smiled. She swam to the ball and pushed it with her beak. Soon the ball was on the"
)
SPAN = BlockSpan(2, 5)


async def serve(swarm: MemorySwarm) -> None:
    for name, start, stop in (("a", 0, 3), ("b", 3, 5), ("c", 5, 8)):
        await swarm.serve(name, start, stop)


async def test_honest_hops_pass_also_with_a_prefix(swarm: MemorySwarm, open_client: OpenClient) -> None:
    await serve(swarm)
    async with open_client(config=PACKED) as client:
        first = client.generate(STORY, max_new_tokens=12)
        answer = await text_of(first)
        second = client.generate(STORY + answer + " The next day", max_new_tokens=12)
        await text_of(second)
        assert first.result.packed_tokens
        assert second.result.reused_tokens > 64
        await client.audits_settled()
        assert client.audits == AuditTally(done=6, passed=6)


async def test_who_gives_something_else_is_banned(swarm: MemorySwarm, open_client: OpenClient) -> None:
    await serve(swarm)
    cheat(swarm.served["b"], noisy)
    async with open_client(config=PACKED) as client:
        await text_of(client.generate(STORY, max_new_tokens=12))
        await client.audits_settled()
        assert [name for name in "abc" if client.ledger.is_banned(name)] == ["b"]


@pytest.fixture(scope="module")
def session(checkpoint: Checkpoint) -> History:
    """What a peer that computes in bfloat16 was given packed, and gave so, at 97 positions."""
    ids = load_tokenizer(checkpoint.folder).encode(TEXT)[:97]
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    reference = open_reference(checkpoint, BlockSpan(0, SPAN.stop), max_tokens=97)
    embedded = load_embedding_and_head(checkpoint, config).embed(ids)
    inputs = rounded_rows(run_session(reference.exact, embedded, BlockSpan(0, SPAN.start)))
    outputs = rounded_rows(run_session(reference.rounded[1], inputs, SPAN))
    return History(inputs, outputs, tuple(range(97)), frozenset(range(97)))


def verdict(checkpoint: Checkpoint, session: History) -> Verdict:
    reference = open_reference(checkpoint, SPAN, max_tokens=97)
    return check_span(
        reference,
        SPAN,
        session.inputs,
        session.outputs,
        codec="bfloat16",
        positions=session.positions,
        packed=session.packed,
    ).verdict


def test_a_rounding_is_allowed_for_where_it_was_asked_for(checkpoint: Checkpoint, session: History) -> None:
    assert verdict(checkpoint, session) is Verdict.PASS
    assert verdict(checkpoint, replace(session, packed=frozenset())) is Verdict.FAIL


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_what_moves_values_further_than_rounding_does_fails(
    share: float, checkpoint: Checkpoint, session: History
) -> None:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(session.outputs.shape, generator=rng) * session.outputs.std() * share
    moved = replace(session, outputs=rounded_rows(session.outputs + noise))
    assert verdict(checkpoint, moved) is Verdict.FAIL


def test_coarser_steps_than_the_codec_has_fail(checkpoint: Checkpoint, session: History) -> None:
    coarse = (session.outputs * 4).round() / 4
    assert verdict(checkpoint, replace(session, outputs=rounded_rows(coarse))) is Verdict.FAIL


def test_others_who_did_not_pack_agree_with_who_did(checkpoint: Checkpoint, session: History) -> None:
    reference = open_reference(checkpoint, SPAN, max_tokens=97)
    plain = [
        History(session.inputs, run_session(runner, session.inputs, SPAN), session.positions)
        for runner in (reference.exact, *reference.rounded)
    ]
    assert judge_by_opinions(session, plain, len(SPAN)).finding.verdict is Verdict.PASS
    wrong = replace(session, outputs=rounded_rows(session.inputs))
    assert judge_by_opinions(wrong, plain, len(SPAN)).finding.verdict is Verdict.SUSPECT
