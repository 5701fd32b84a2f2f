"""Passes of training on the bundled model: honest ones pass, those of benchmarks' liars do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.blocks import load_blocks
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.target import Target
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.learning.adapter import PROJECTIONS, Adapter, AdapterLayout, LowRank
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.learning.span_passes import Gradients, Microbatch, SpanPasses, complete
from p2pinfer.models.numerics import BFLOAT16, FLOAT16, FLOAT32, Numerics
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.text.text import load_tokenizer
from p2pinfer.models.verify.deviation import PassDeviation
from p2pinfer.models.verify.reference import Reference, open_reference
from p2pinfer.models.verify.train_passes import TrainedPass, compare_pass, rerun_pass
from p2pinfer.node.evidence.pass_verdict import judge_pass
from p2pinfer.reputation.verdict import Verdict

from ..conftest import WriteCheckpoint

SPAN = BlockSpan(0, 2)
LENGTHS = (60, 9, 33)
TEXT = (
    "Once upon a time, there was a little fox who lived in a big forest. He had a red ball and he liked to "
    "play with it every day. One day, the ball fell into the river. The fox was sad and he began to cry. A "
    "duck saw him and said, 'Why are you sad, little fox?' The fox said, 'My ball is in the river and I can "
    "not swim.' The duck smiled. She swam to the ball and pushed it with her beak. Soon it was on the shore."
)


@dataclass(frozen=True)
class Results:
    output: Tensor
    hidden: Tensor
    vector: Tensor


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return open_reference(checkpoint, SPAN, max_tokens=1)


@pytest.fixture(scope="module")
def asked(checkpoint: Checkpoint, reference: Reference) -> TrainedPass:
    """A backward pass whose gradient is drawn: what stands behind the span is of no interest."""
    torch.manual_seed(0)
    ids = load_tokenizer(checkpoint.folder).encode(TEXT)[: sum(LENGTHS)]
    hidden = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="bfloat16")).embed(ids)
    order = torch.cat([torch.arange(length) for length in LENGTHS])
    architecture = reference.exact.architecture
    layout = AdapterLayout(tuple(LowRank(b, name, 4, 1.0) for b in (0, 1) for name in PROJECTIONS))
    values = torch.randn(layout.size(architecture, SPAN)) * 0.02
    batch = Microbatch(SPAN, Rows(LENGTHS, order, order), Adapter(layout, values, architecture, SPAN))
    gradient = (torch.randn(hidden.shape) * 1e-3).to(torch.bfloat16)
    return TrainedPass(batch, hidden.clone(), gradient)


def results_of(
    checkpoint: Checkpoint, asked: TrainedPass, numerics: Numerics, span: BlockSpan = SPAN
) -> Results:
    passes = SpanPasses(load_blocks(checkpoint, SPAN, Target(torch.device("cpu"), numerics)))
    batch = replace(asked.batch, span=span)
    forwarded = complete(passes.forward(batch, asked.hidden))
    assert asked.gradient is not None
    found: Gradients = complete(passes.backward(batch, forwarded.inputs, asked.gradient))
    assert found.hidden is not None and found.adapter is not None
    return Results(forwarded.output, found.hidden, found.adapter)


@pytest.fixture(scope="module")
def honest(checkpoint: Checkpoint, asked: TrainedPass) -> Results:
    return results_of(checkpoint, asked, BFLOAT16)


def verdict(deviation: PassDeviation) -> Verdict:
    return judge_pass(deviation).verdict


def test_passes_of_honest_peers_pass_there_and_back(
    checkpoint: Checkpoint, reference: Reference, asked: TrainedPass, honest: Results
) -> None:
    forward = TrainedPass(asked.batch, asked.hidden)
    for results, wire in ((honest, torch.bfloat16), (results_of(checkpoint, asked, FLOAT32), torch.float32)):
        there, back = rerun_pass(reference, forward, wire), rerun_pass(reference, asked, wire)
        assert verdict(compare_pass(there, results.output, None)) is Verdict.PASS
        assert verdict(compare_pass(back, results.hidden, results.vector)) is Verdict.PASS
        assert verdict(compare_pass(back, None, results.vector)) is Verdict.PASS


LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "scaled": lambda each: each * 0.9,
    "sign": lambda each: -each,
    "stale": lambda each: each.roll(1, 0),
    "another half": lambda each: torch.where(
        torch.arange(len(each.flatten())).view(each.shape) % 2 == 0, each, 0
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_gradients_that_are_others_than_those_of_the_blocks_fail(
    reference: Reference, asked: TrainedPass, honest: Results, lie: str
) -> None:
    change = LIES[lie]
    back = rerun_pass(reference, asked, torch.bfloat16)
    assert verdict(compare_pass(back, change(honest.hidden), honest.vector)) is Verdict.FAIL
    assert verdict(compare_pass(back, honest.hidden, change(honest.vector))) is Verdict.FAIL
    assert verdict(compare_pass(back, None, change(honest.vector))) is Verdict.FAIL


def test_a_skipped_block_fails_there_and_back(
    checkpoint: Checkpoint, reference: Reference, asked: TrainedPass
) -> None:
    lazy = results_of(checkpoint, asked, BFLOAT16, BlockSpan(0, 1))
    forward = TrainedPass(asked.batch, asked.hidden)
    there, back = (rerun_pass(reference, each, torch.bfloat16) for each in (forward, asked))
    assert verdict(compare_pass(there, lazy.output, None)) is Verdict.FAIL
    assert verdict(compare_pass(back, lazy.hidden, lazy.vector)) is Verdict.FAIL


def test_one_tensor_of_the_adapter_is_enough_to_be_found(
    reference: Reference, asked: TrainedPass, honest: Results
) -> None:
    assert asked.batch.adapter is not None
    for name, where in asked.batch.adapter.places(SPAN):
        changed = honest.vector.clone()
        changed[where] *= 0.9
        finding = judge_pass(
            compare_pass(rerun_pass(reference, asked, torch.bfloat16), honest.hidden, changed)
        )
        assert finding.verdict is Verdict.FAIL
        assert name in finding.reason
        break


def test_nothing_is_due_for_a_matrix_whose_other_one_is_zero(
    checkpoint: Checkpoint, reference: Reference, asked: TrainedPass
) -> None:
    """As A of every LoRA before its first step. Anything but zeros is wrong there."""
    adapter = asked.batch.adapter
    assert adapter is not None
    values = adapter.values.clone()
    for name, where in adapter.places(SPAN):
        if name.startswith("B"):
            values[where] = 0
    fresh = Adapter(adapter.layout, values, reference.exact.architecture, SPAN)
    again = replace(asked, batch=replace(asked.batch, adapter=fresh))
    results = results_of(checkpoint, again, BFLOAT16)
    back = rerun_pass(reference, again, torch.bfloat16)
    assert verdict(compare_pass(back, results.hidden, results.vector)) is Verdict.PASS
    name, where = next(iter(adapter.places(SPAN)))
    assert name.startswith("A")
    assert not results.vector[where].any()
    invented = results.vector.clone()
    invented[where] = float(results.vector.abs().mean())
    assert verdict(compare_pass(back, results.hidden, invented)) is Verdict.FAIL


def test_nobody_is_judged_by_a_pass_that_rounding_decides(
    checkpoint: Checkpoint, reference: Reference, asked: TrainedPass
) -> None:
    """Who trains chooses the adapter, and may choose one that blows up every rounding error."""
    adapter = asked.batch.adapter
    assert adapter is not None
    for factor in (50.0, 1e3, 1e6):
        wild = Adapter(adapter.layout, adapter.values * factor, reference.exact.architecture, SPAN)
        again = replace(asked, batch=replace(asked.batch, adapter=wild))
        results = results_of(checkpoint, again, BFLOAT16)
        try:
            back = rerun_pass(reference, again, torch.bfloat16)
        except ValueError:
            continue
        assert verdict(compare_pass(back, results.hidden, results.vector)) is not Verdict.FAIL


def test_equal_tokens_count_as_one(checkpoint: Checkpoint, reference: Reference, asked: TrainedPass) -> None:
    word = replace(asked, hidden=asked.hidden[:1].expand(len(asked.hidden), -1).contiguous())
    results = results_of(checkpoint, word, BFLOAT16)
    found = compare_pass(rerun_pass(reference, word, torch.bfloat16), results.hidden, results.vector)
    assert found.alike > 0.5
    assert verdict(found) is Verdict.INCONCLUSIVE


def test_gradients_of_no_token_are_passed_over(
    checkpoint: Checkpoint, reference: Reference, asked: TrainedPass
) -> None:
    """A loss of one text: the others have no gradient, and zeros of theirs neither help nor hurt."""
    assert asked.gradient is not None
    gradient = asked.gradient.clone()
    gradient[: LENGTHS[0] + LENGTHS[1]] = 0
    part = replace(asked, gradient=gradient)
    results = results_of(checkpoint, part, BFLOAT16)
    back = rerun_pass(reference, part, torch.bfloat16)
    found = compare_pass(back, results.hidden, results.vector)
    assert found.hidden is not None
    assert found.hidden.tokens == LENGTHS[2] - 1
    assert verdict(found) is Verdict.PASS
    assert verdict(compare_pass(back, results.hidden * 0.9, results.vector)) is Verdict.FAIL


def test_gradients_that_dtypes_do_not_round_alike_say_nothing(
    checkpoint: Checkpoint, reference: Reference, asked: TrainedPass
) -> None:
    """One large token, and others far below what float16 has beside it: an honest hop may return zeros."""
    assert asked.gradient is not None
    gradient = asked.gradient.float() * 1e-9
    gradient[-1] *= 1e9
    wide = replace(asked, gradient=gradient)
    results = results_of(checkpoint, wide, FLOAT16)
    back = rerun_pass(reference, wide, torch.float32)
    assert verdict(compare_pass(back, results.hidden, results.vector)) is not Verdict.FAIL
    faint = replace(asked, gradient=asked.gradient.float() * 1e-36)
    results = results_of(checkpoint, faint, BFLOAT16)
    back = rerun_pass(reference, faint, torch.bfloat16)
    assert (
        verdict(compare_pass(back, torch.zeros_like(results.hidden), results.vector * 0)) is not Verdict.FAIL
    )


def test_tokens_with_faint_inputs_say_nothing(
    checkpoint: Checkpoint, reference: Reference, asked: TrainedPass
) -> None:
    hidden = asked.hidden.float()
    hidden[5:50] *= 1e-8
    faint = replace(asked, hidden=hidden)
    results = results_of(checkpoint, faint, FLOAT16)
    back = rerun_pass(reference, faint, torch.float32)
    assert verdict(compare_pass(back, results.hidden, results.vector)) is not Verdict.FAIL


class OtherExpert:
    """`ExpertChoice` of an honest peer whose rounding sends the most doubtful token to its other expert."""

    def choose(self, block: int, scores: Tensor, count: int) -> Tensor:
        best = scores.topk(count + 1, dim=-1)
        token = int((best.values[:, count - 1] - best.values[:, count]).argmin())
        chosen = best.indices[:, :count].clone()
        chosen[token, count - 1] = best.indices[token, count]
        return chosen


def test_a_token_between_two_experts_makes_nobody_fail(
    write_checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    """Where it goes decides on the gradients of all tokens before it, and on those of the adapter."""
    mixture = open_checkpoint(write_checkpoint(tmp_path, "mixtral"), "mixtral")
    reference = open_reference(mixture, SPAN, max_tokens=1)
    torch.manual_seed(0)
    lengths = (40,) * 12
    order = torch.cat([torch.arange(length) for length in lengths])
    architecture = reference.exact.architecture
    layout = AdapterLayout(tuple(LowRank(b, name, 4, 1.0) for b in (0, 1) for name in PROJECTIONS[:4]))
    values = torch.randn(layout.size(architecture, SPAN)) * 0.02
    batch = Microbatch(SPAN, Rows(lengths, order, order), Adapter(layout, values, architecture, SPAN))
    hidden = torch.randn(len(order), mixture.spec.hidden_size).to(torch.bfloat16)
    gradient = (torch.randn(hidden.shape) * 1e-3).to(torch.bfloat16)
    asked = TrainedPass(batch, hidden, gradient)
    blocks = load_blocks(mixture, SPAN, Target(torch.device("cpu"), BFLOAT16))
    passes = SpanPasses(blocks.choosing(OtherExpert()))
    forwarded = complete(passes.forward(batch, hidden))
    found = complete(passes.backward(batch, forwarded.inputs, gradient))
    assert found.hidden is not None and found.adapter is not None
    there = rerun_pass(reference, TrainedPass(batch, hidden), torch.bfloat16)
    back = rerun_pass(reference, asked, torch.bfloat16)
    assert verdict(compare_pass(there, forwarded.output, None)) is Verdict.PASS
    assert verdict(compare_pass(back, found.hidden, found.adapter)) is Verdict.PASS
    assert verdict(compare_pass(back, None, found.adapter)) is Verdict.PASS
    for change in LIES.values():
        assert verdict(compare_pass(back, change(found.hidden), found.adapter)) is Verdict.FAIL
