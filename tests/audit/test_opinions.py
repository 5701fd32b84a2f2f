"""Verdicts by the outputs of others, where the blocks do not fit: one side has to be far enough ahead."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from p2pinfer.audit.opinions import Vote, compare_elsewhere, judge_by_opinions
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.node.evidence.hop_record import History, HopRecord
from p2pinfer.reputation.verdict import Verdict

from .test_verifier import SPAN, computed, honest

__all__ = ["honest"]  # a fixture
PASS, SUSPECT, INCONCLUSIVE = Verdict.PASS, Verdict.SUSPECT, Verdict.INCONCLUSIVE


def vote(audited: HopRecord, *others: HopRecord, lead: int = 2) -> Vote:
    return compare_elsewhere(audited, others, 320, lead)


def said(audited: HopRecord, *others: HopRecord, lead: int = 2) -> Verdict:
    return vote(audited, *others, lead=lead).finding.verdict


def test_two_peers_that_agree_pass_a_third_and_blame_nobody(honest: tuple[Tensor, list[Tensor]]) -> None:
    """To the bit or but for rounding; who of two that differ is right is not known."""
    inputs, runs = honest
    lie = computed(inputs, inputs)
    exact, fused, stepwise = (computed(inputs, run) for run in runs)
    for right, one, other in permutations((exact, fused, stepwise)):
        decided = vote(right, one, other)
        assert decided.finding.verdict is PASS and not decided.outvoted
    for one, other in ((exact, exact), (exact, fused), (stepwise, fused)):
        assert said(fused, one, other) is PASS
        assert said(lie, one, other) is INCONCLUSIVE
    assert said(fused, exact) is INCONCLUSIVE
    assert said(fused, exact, lead=1) is PASS


def test_whom_three_peers_contradict_in_one_voice_is_suspect_and_no_more(
    honest: tuple[Tensor, list[Tensor]],
) -> None:
    inputs, runs = honest
    first, second, third = (computed(inputs, run) for run in runs)
    for lie in (inputs, runs[0] * 0.5, torch.zeros_like(inputs)):
        accused = computed(inputs, lie)
        assert said(accused, first, second, third) is SUSPECT
    assert said(accused, first, first, first, lead=1) is SUSPECT
    # Somebody who agrees with it, or with nobody, leaves it open.
    assert said(accused, first, second, accused) is INCONCLUSIVE
    assert said(accused, first, second, computed(inputs, inputs.flip(0))) is INCONCLUSIVE


def test_one_that_vouches_for_a_lie_does_not_save_it_and_is_outvoted_with_it(
    honest: tuple[Tensor, list[Tensor]],
) -> None:
    inputs, runs = honest
    first, second, third = (computed(inputs, run) for run in runs)
    lie, friend = (computed(inputs, runs[0] * 0.5) for _ in range(2))
    assert said(lie, first, friend, second, third) is INCONCLUSIVE
    decided = vote(lie, first, friend, second, third, first)
    assert decided.finding.verdict is SUSPECT and decided.finding.contradicted
    assert decided.outvoted == (1,)
    # Two friends among five leave it open.
    tied = vote(lie, first, friend, second, friend, third)
    assert tied.finding.verdict is INCONCLUSIVE and not tied.outvoted


def test_who_contradicts_an_honest_peer_alone_is_outvoted(honest: tuple[Tensor, list[Tensor]]) -> None:
    inputs, runs = honest
    first, second, third = (computed(inputs, run) for run in runs)
    slander = computed(inputs, inputs)
    assert said(first, slander, second) is INCONCLUSIVE
    assert said(first, slander, second, third) is INCONCLUSIVE
    decided = vote(first, slander, second, third, second)
    assert decided.finding.verdict is PASS
    assert decided.outvoted == (0,)
    # Two against two others decide nothing, and three of one mind outvote.
    assert said(first, slander, second, slander, third) is INCONCLUSIVE
    assert said(first, slander, slander, slander) is SUSPECT


def test_a_peer_that_computes_in_another_dtype_is_none_to_suspect(
    checkpoint: Checkpoint, honest: tuple[Tensor, list[Tensor]]
) -> None:
    """Three opinions that agree to the bit are the usual case, and no measure of rounding."""
    inputs, (_, fused, _) = honest
    for dtype in ("float32", "float16", "bfloat16"):
        config = ComputeConfig(device="cpu", dtype=dtype, cache_bytes=1 << 24)
        outputs = run_session(open_runner(checkpoint, SPAN, config), inputs).bfloat16().float()
        same = computed(inputs, fused)
        assert said(computed(inputs, outputs), same, same, same) is PASS


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e9])
def test_an_opinion_that_is_no_number_blames_nobody_else(
    honest: tuple[Tensor, list[Tensor]], value: float
) -> None:
    inputs, (exact, fused, _) = honest
    bad = exact.clone()
    bad[3, 5] = value
    right, useless, same = (computed(inputs, run) for run in (exact, bad, fused))
    assert said(right, useless, same) is INCONCLUSIVE
    assert said(right, same, useless) is INCONCLUSIVE
    assert said(useless, same, same) is Verdict.FAIL, "everybody can see that"


@pytest.mark.parametrize("lies_first", [True, False])
def test_two_peers_that_contradict_each_other_decide_nothing(
    honest: tuple[Tensor, list[Tensor]], lies_first: bool
) -> None:
    inputs, (exact, fused, _) = honest
    one, other = computed(inputs, inputs), computed(inputs, fused)
    if not lies_first:
        one, other = other, one
    finding = vote(computed(inputs, exact), one, other).finding
    assert finding.verdict is INCONCLUSIVE
    assert "contradict" in finding.reason
    assert said(computed(inputs, inputs * 2), one, other) is INCONCLUSIVE


def test_a_text_of_one_word_makes_no_honest_peer_suspect_and_hides_no_lie(checkpoint: Checkpoint) -> None:
    """Its tokens round alike, in every dtype otherwise: float32 lies 23 units from three that agree."""
    span, at = BlockSpan(0, 8), tuple(range(97))
    exact, rounded = (
        open_runner(checkpoint, span, ComputeConfig(device="cpu", dtype=dtype, cache_bytes=1 << 24))
        for dtype in ("float32", "bfloat16")
    )
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))
    for word in (314, 1337, 2718):
        inputs = ends.embed([word] * 97)
        honest, lie, other = (
            History(inputs, run_session(runner, inputs, part).bfloat16().float(), at)
            for runner, part in ((exact, span), (exact, BlockSpan(0, 7)), (rounded, span))
        )
        assert judge_by_opinions(honest, [other] * 3, len(span)).finding.verdict in (PASS, INCONCLUSIVE)
        assert judge_by_opinions(lie, [other] * 3, len(span)).finding.verdict is SUSPECT
