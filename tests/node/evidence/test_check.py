from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.reference import Reference, open_reference
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.node.evidence.check import check_span
from p2pinfer.reputation.verdict import Limit, Thresholds, Verdict

SPAN = BlockSpan(2, 4)


@pytest.fixture(scope="module")
def reference(tiny_stories: Path) -> Reference:
    return open_reference(open_checkpoint(tiny_stories, "tiny-stories"), SPAN, max_tokens=64)


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(33, 320, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def test_a_hop_that_did_as_asked_passes(reference: Reference, inputs: Tensor) -> None:
    outputs = run_session(reference.rounded[0], inputs)
    finding = check_span(reference, SPAN, inputs, outputs, codec="bfloat16")
    assert finding.verdict is Verdict.PASS
    assert finding.deviation is not None
    assert not finding.logits_checked


def test_a_hop_that_sent_back_what_it_got_fails(reference: Reference, inputs: Tensor) -> None:
    assert check_span(reference, SPAN, inputs, inputs, codec="bfloat16").verdict is Verdict.FAIL


def test_outputs_that_are_not_finite_fail_without_a_measurement(reference: Reference, inputs: Tensor) -> None:
    finding = check_span(reference, SPAN, inputs, inputs * torch.nan, codec="bfloat16")
    assert finding.verdict is Verdict.FAIL
    assert finding.deviation is None


def test_what_cannot_be_run_again_says_nothing_about_the_hop(reference: Reference) -> None:
    long = torch.zeros(65, 320)
    finding = check_span(reference, SPAN, long, long, codec="float32")
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert "65 tokens" in finding.reason


def test_other_limits_can_be_set(reference: Reference, inputs: Tensor) -> None:
    outputs = run_session(reference.rounded[0], inputs)
    usual = check_span(reference, SPAN, inputs, outputs, codec="bfloat16").deviation
    assert usual is not None
    half = max(chunk.median_rho for chunk in usual.chunks) / 2
    # A limit widens by what it lies above 1 for few tokens that round alike; one below 1 gets narrower.
    strict = Thresholds(chunk=Limit(half, half))
    finding = check_span(reference, SPAN, inputs, outputs, codec="bfloat16", thresholds=strict)
    assert finding.verdict is Verdict.FAIL
