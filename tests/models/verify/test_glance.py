"""What passes at a glance: honest outputs, however they are rounded, and no gross lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p2pinfer import models
from p2pinfer.errors import WrongOutput
from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import Chunk
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.models.verify.glance import glance_at
from p2pinfer.models.verify.reference import Reference, open_reference
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.reputation.verdict import Verdict, judge_glance

TOKENS = 41
TEXT = (
    "Once upon a time, there was a little fox who lived in a forest. One day, it found a red ball. The fox"
    " was very happy and played with it all day. Then a bear came and asked for it, and they played together."
)
SPANS = (BlockSpan(0, 3), BlockSpan(3, 5), BlockSpan(5, 8), BlockSpan(7, 8), BlockSpan(0, 8))


@cache
def reference() -> Reference:
    checkpoint = open_checkpoint(Path(models.__path__[0]) / BUNDLED_MODEL, BUNDLED_MODEL)
    return open_reference(checkpoint, BlockSpan(0, 8), max_tokens=64)


@cache
def inputs_of(start: int) -> Tensor:
    """(TOKENS, hidden_size), as an honest peer hands it on."""
    checkpoint = open_checkpoint(Path(models.__path__[0]) / BUNDLED_MODEL, BUNDLED_MODEL)
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="bfloat16"))
    embedded = ends.embed(load_tokenizer(checkpoint.folder).encode(TEXT)[:TOKENS])
    assert len(embedded) == TOKENS
    if not start:
        return embedded
    return run_session(reference().rounded[0], embedded, BlockSpan(0, start)).bfloat16()


def verdict_on(span: BlockSpan, outputs: Tensor, positions: Sequence[int] | None = None) -> Verdict:
    glance = glance_at(
        reference().exact, span, inputs_of(span.start).float(), outputs.bfloat16().float(), positions
    )
    return judge_glance(glance).verdict


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_honest_outputs_pass_however_they_were_rounded(span: BlockSpan) -> None:
    given = inputs_of(span.start)
    fused, stepwise = reference().rounded
    for runner in (fused, stepwise, reference().exact):
        assert verdict_on(span, run_session(runner, given, span)) is Verdict.PASS
    lease = fused.cache.reserve(TOKENS)
    decoded = torch.cat([fused.run([Chunk(lease, at, given[at : at + 1])], span)[0] for at in range(TOKENS)])
    lease.release()
    assert verdict_on(span, decoded) is Verdict.PASS
    last = range(TOKENS - 32, TOKENS)
    assert verdict_on(span, decoded[-32:], last) is Verdict.PASS


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_gross_lies_do_not_pass_and_are_not_convicted(span: BlockSpan) -> None:
    given, fused = inputs_of(span.start), reference().rounded[0]
    honest = run_session(fused, given, span)
    lies = {"identity": given.float(), "others": honest.flip(0), "noise": honest + 0.1 * honest.std(0)}
    lies["one token"] = torch.cat([honest[:20], given[20:21].float(), honest[21:]])
    if len(span) > 1:
        lies["skipped"] = run_session(fused, given, BlockSpan(span.start, span.stop - 1))
    for name, outputs in lies.items():
        assert verdict_on(span, outputs) is Verdict.INCONCLUSIVE, name


def test_a_change_that_is_aimed_at_the_next_token_is_seen_by_the_logits() -> None:
    """It lies as near as rounding does, and a glance at the last hop's norms alone would pass it."""
    span, exact = SPANS[2], reference().exact
    checkpoint = open_checkpoint(Path(models.__path__[0]) / BUNDLED_MODEL, BUNDLED_MODEL)
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))
    given = inputs_of(span.start)
    honest = run_session(reference().rounded[0], given, span)
    best = ends.logits(honest).topk(2)
    chances = best.values - ends.logits(honest).logsumexp(-1, keepdim=True)
    lead = chances.exp()[:, 0] - chances.exp()[:, 1]
    near = [int(at) for at in lead.argsort()[:4] if 0.02 < lead[at] < 0.12]
    assert near
    name = "model.embed_tokens.weight" if checkpoint.config.get("tie_word_embeddings") else "lm_head.weight"
    rows, gain = checkpoint.read(name).float(), checkpoint.read("model.norm.weight").float()
    aimed = honest.clone()
    for at in near:
        first, second = (int(each) for each in best.indices[at])
        way = (rows[second] - rows[first]) * gain
        gap = (best.values[at, 0] - best.values[at, 1]) * honest[at].square().mean().sqrt()
        aimed[at] += 1.5 * gap / way.square().sum() * way
    everywhere = range(TOKENS)

    def verdict(outputs: Tensor, followed: Sequence[int]) -> Verdict:
        sent = outputs.bfloat16().float()
        return judge_glance(glance_at(exact, span, given.float(), sent, ends=ends, followed=followed)).verdict

    assert verdict(aimed, ()) is Verdict.PASS
    assert verdict(aimed, everywhere) is Verdict.INCONCLUSIVE
    assert verdict(aimed, near[:1]) is Verdict.INCONCLUSIVE
    assert verdict(honest, everywhere) is Verdict.PASS


def test_too_few_tokens_do_not_pass() -> None:
    span = SPANS[2]
    honest = run_session(reference().rounded[0], inputs_of(span.start), span)
    assert verdict_on(span, honest[-7:], range(TOKENS - 7, TOKENS)) is Verdict.INCONCLUSIVE
    assert verdict_on(span, honest[-8:], range(TOKENS - 8, TOKENS)) is Verdict.PASS
    assert verdict_on(span, honest[:0], ()) is Verdict.INCONCLUSIVE


def test_what_cannot_be_compared_is_said() -> None:
    span, exact = SPANS[0], reference().exact
    given = inputs_of(0).float()
    with pytest.raises(ValueError, match="have not"):
        glance_at(exact, span, given, given[:2], (0, TOKENS))
    with pytest.raises(ValueError, match="inputs cannot be"):
        glance_at(exact, span, given * torch.inf, given)
    for outputs in (given * torch.nan, given[:, :5], given * 1e12):
        with pytest.raises(WrongOutput):
            glance_at(exact, span, given, outputs)
