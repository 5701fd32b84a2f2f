"""Hidden states that no model gives, and any client may send: whoever computes with them is not blamed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from p2pinfer.audit.opinions import judge_by_opinions
from p2pinfer.models.checkpoint.checkpoint import Checkpoint
from p2pinfer.models.compute.runner import SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.reference import Reference, open_reference
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.models.verify.verify import compare, rerun
from p2pinfer.node.evidence.hop_record import History
from p2pinfer.reputation.verdict import Finding, Verdict, judge

SPAN = BlockSpan(2, 4)
TOKENS = 33
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return open_reference(checkpoint, SPAN, max_tokens=64)


@pytest.fixture(scope="module")
def runners(checkpoint: Checkpoint) -> dict[str, SpanRunner]:
    """Honest peers: in each dtype, and in bfloat16 one operation after the other."""
    opened = {
        dtype: open_runner(checkpoint, SPAN, ComputeConfig(device="cpu", dtype=dtype, cache_bytes=1 << 22))
        for dtype in ("bfloat16", "float16", "float32")
    }
    return opened | {"stepwise": opened["bfloat16"].stepwise()}


@pytest.fixture(scope="module")
def usual() -> Tensor:
    return torch.randn(TOKENS, 320, generator=torch.Generator().manual_seed(1))


def hostile(kind: str, usual: Tensor) -> Tensor:
    """(tokens, hidden_size), as the wire carries them."""
    alternately = (torch.arange(TOKENS) % 2)[:, None]
    one_channel = torch.zeros(TOKENS, 320)
    one_channel[torch.arange(TOKENS), torch.arange(TOKENS) * 7] = 1.0
    inputs = {
        "underflow": usual * 1e-37,
        "no normal numbers": usual * 1e-39,
        "float16's end": usual * 1e-8,
        "just below": usual * 5e-5,
        "just above": usual * 8e-5,
        "one channel": one_channel * 1e-6,
        "one channel, large": one_channel * 1e4,
        "nothing": usual * 0,
        "large": usual * 1e4,
        "every other token": torch.where(alternately == 0, usual, usual * 1e-37),
        "opposites": usual[:1] * (1 - 2 * alternately),
    }[kind]
    return inputs.to(BF16).float()


def judged(reference: Reference, inputs: Tensor, outputs: Tensor) -> Finding:
    floor = rerun(reference, SPAN, inputs, BF16)
    return judge(compare(floor, outputs.to(BF16).float(), range(TOKENS)))


KINDS = [
    "underflow", "no normal numbers", "float16's end", "just below", "just above", "one channel",
    "one channel, large", "nothing", "large", "every other token", "opposites",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_honest_peer_fails_whatever_it_is_sent(
    kind: str, reference: Reference, runners: dict[str, SpanRunner], usual: Tensor
) -> None:
    """A client could have had anybody banned everywhere, with a proof, in ordinary bfloat16 too."""
    inputs = hostile(kind, usual)
    for name, runner in runners.items():
        outputs = run_session(runner, inputs, SPAN)
        if outputs.isfinite().all():  # else it does not sign for them
            finding = judged(reference, inputs, outputs)
            assert finding.verdict in (Verdict.PASS, Verdict.INCONCLUSIVE), f"{name}: {finding.reason}"


def test_a_faint_token_says_nothing_and_hides_no_other(
    reference: Reference, runners: dict[str, SpanRunner], usual: Tensor
) -> None:
    inputs = usual.clone()
    inputs[0] *= 1e-9
    inputs[10] *= 1e-9
    inputs = inputs.to(BF16).float()
    outputs = run_session(runners["bfloat16"], inputs, SPAN)
    finding = judged(reference, inputs, outputs)
    assert finding.verdict is Verdict.PASS and finding.deviation is not None
    assert finding.deviation.first_rho is None and finding.deviation.tokens == TOKENS - 2
    outputs[11] = outputs[12]
    assert judged(reference, inputs, outputs).verdict is Verdict.FAIL


def test_opinions_on_faint_tokens_make_nobody_suspect(runners: dict[str, SpanRunner], usual: Tensor) -> None:
    inputs = hostile("float16's end", usual)
    at = tuple(range(TOKENS))
    said = {name: History(inputs, run_session(each, inputs, SPAN), at) for name, each in runners.items()}
    others = [said["bfloat16"]] * 3
    assert judge_by_opinions(said["float16"], others, len(SPAN)).finding.verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("kind", KINDS)
def test_no_honest_peer_is_outvoted_whatever_it_is_sent(
    kind: str, runners: dict[str, SpanRunner], usual: Tensor
) -> None:
    """Each by three that agree to the bit in another dtype, which would cost it its place."""
    inputs, at = hostile(kind, usual), tuple(range(TOKENS))
    said: dict[str, History] = {}
    for name, runner in runners.items():
        outputs = run_session(runner, inputs, SPAN).to(BF16).float()
        if outputs.isfinite().all():
            said[name] = History(inputs, outputs, at)
    for name, audited in said.items():
        for other, opinion in said.items():
            vote = judge_by_opinions(audited, [opinion] * 3, len(SPAN))
            assert vote.finding.verdict in (Verdict.PASS, Verdict.INCONCLUSIVE), f"{name} by {other}"
            assert not vote.outvoted
