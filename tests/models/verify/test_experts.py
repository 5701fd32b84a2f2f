"""Near ties of routers: an honest peer may take either expert, and a cheat neither more nor less for it."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from p2pinfer.audit.opinions import judge_by_opinions
from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import SpanRunner, open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify import experts
from p2pinfer.models.verify.experts import Paths, RoutingLog, Run, explain
from p2pinfer.models.verify.reference import open_reference, open_tail
from p2pinfer.models.verify.sessions import run_session, run_sessions
from p2pinfer.models.verify.verify import compare, rerun
from p2pinfer.node.evidence.hop_record import History
from p2pinfer.reputation.verdict import Verdict, judge

from ..conftest import WriteCheckpoint

safetensors_files: Any = safetensors.torch  # untyped
SPAN = BlockSpan(0, 3)
TOKENS = 65
BF16 = torch.bfloat16


class Contrary:
    """A peer whose rounding decides near ties the other way: an `ExpertChoice`."""

    def __init__(self, tie: float) -> None:
        self._tie = tie
        self.turned = 0

    def choose(self, block: int, scores: Tensor, count: int) -> Tensor:
        best = scores.topk(count + 1, dim=-1)
        tied = best.values[:, count - 1] - best.values[:, count] < self._tie
        chosen = best.indices[:, :count].clone()
        chosen[tied, count - 1] = best.indices[tied, count]
        self.turned += int(tied.sum())
        return chosen


class NextBest:
    """A cheat that leaves out the best expert: an `ExpertChoice`."""

    def choose(self, block: int, scores: Tensor, count: int) -> Tensor:
        return scores.topk(count + 1, dim=-1).indices[:, 1:]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: WriteCheckpoint) -> Checkpoint:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("mixture"), "mixtral", hidden_size=64, num_local_experts=8
    )
    return open_checkpoint(folder, "mixture")


@pytest.fixture(scope="module")
def inputs(mixture: Checkpoint) -> Tensor:
    ends = load_embedding_and_head(mixture, ComputeConfig(device="cpu", dtype="float32"))
    rng = random.Random(1)
    ids = [rng.randrange(199) for _ in range(TOKENS)]
    return (20 * ends.embed(ids)).to(BF16).float()


@pytest.fixture(scope="module")
def runner(mixture: Checkpoint) -> SpanRunner:
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    return open_runner(mixture, BlockSpan(0, 4), config)


def a_log(*scores: Tensor) -> RoutingLog:
    """A log of blocks 0, 1, ... that go to two experts each."""
    log = RoutingLog()
    for block, each in enumerate(scores):
        log.choose(block, each, 2)
    return log


def a_run(right: Paths, log: RoutingLog) -> Callable[[Paths], Run]:
    """Tokens deviate by 20 until their path is the right one."""

    def run(paths: Paths) -> Run:
        rho = torch.ones(4)
        for token, path in right.items():
            rho[token] = 1.0 if paths.get(token) == path else 20.0
        return Run(rho, log)

    return run


TIED = torch.tensor([[3.0, 2.0, 1.999, -1.0]]).repeat(4, 1)
CLEAR = torch.tensor([[3.0, 2.0, 1.0, -1.0]]).repeat(4, 1)
NOISE = {0: torch.full((4,), 0.001), 1: torch.full((4,), 0.001)}


@pytest.mark.parametrize(
    "right",
    [
        {2: {0: (0, 2)}},
        {0: {1: (0, 2)}, 3: {0: (0, 2)}},
        {1: {0: (0, 2), 1: (0, 2)}},
    ],
)
def test_the_choices_that_explain_an_output_are_found(right: Paths) -> None:
    log = a_log(TIED, TIED)
    run = a_run(right, log)
    found = explain(run, run({}), range(4), NOISE)
    assert found.paths == right
    assert not found.undecided


def test_what_no_near_tie_explains_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are further down are none that rounding could have led to."""
    right = {2: {0: (0, 3)}}
    for log in (a_log(TIED, TIED), a_log(CLEAR, CLEAR)):
        run = a_run(right, log)
        found = explain(run, run({}), range(4), NOISE)
        assert not found.paths
        assert not found.undecided
    monkeypatch.setattr(experts, "MAX_RUNS", 1)
    run = a_run(right, a_log(TIED, TIED))
    assert explain(run, run({}), range(4), NOISE).undecided == {2}


def test_near_ties_add_up_as_errors_do() -> None:
    """Two swaps of six roundings each are more than eight together, and not to be had by luck."""
    gap = torch.tensor([[3.0, 2.0, 1.994, -1.0]]).repeat(4, 1)
    log = a_log(gap, gap)
    for right, is_found in (({1: {0: (0, 2)}}, True), ({1: {0: (0, 2), 1: (0, 2)}}, False)):
        run = a_run(right, log)
        assert bool(explain(run, run({}), range(4), NOISE).paths) is is_found


def test_who_decides_near_ties_otherwise_is_honest(
    mixture: Checkpoint, runner: SpanRunner, inputs: Tensor
) -> None:
    contrary = Contrary(0.008)
    outputs = run_session(runner.choosing(contrary), inputs, SPAN)
    assert contrary.turned > 3
    reference = open_reference(mixture, SPAN, max_tokens=128)
    floor = rerun(reference, SPAN, inputs, BF16)
    blind = compare(replace(floor, explain=None), outputs, range(TOKENS))
    assert judge(blind).verdict is Verdict.FAIL, "or there is nothing to explain here"
    finding = judge(compare(floor, outputs, range(TOKENS)))
    assert finding.verdict is Verdict.PASS, finding.reason
    assert reference.exact.cache.free_tokens == reference.exact.cache.capacity_tokens


@pytest.mark.parametrize("options", [{"num_experts_per_tok": 1}, {"num_experts_per_tok": 3}], ids=["1", "3"])
def test_near_ties_are_nobodys_fault_however_many_experts_a_token_goes_to(
    options: dict[str, int], tmp_path: Path, write_checkpoint: WriteCheckpoint, inputs: Tensor
) -> None:
    folder = write_checkpoint(tmp_path, "mixtral", hidden_size=64, num_local_experts=8, seed=2, **options)
    checkpoint = open_checkpoint(folder, "mixture")
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    contrary, runner = Contrary(0.006), open_runner(checkpoint, SPAN, config)
    outputs = run_session(runner.choosing(contrary), inputs, SPAN)
    assert contrary.turned
    floor = rerun(open_reference(checkpoint, SPAN, max_tokens=128), SPAN, inputs, BF16)
    finding = judge(compare(floor, outputs, range(TOKENS)))
    assert finding.verdict is Verdict.PASS, finding.reason
    assert judge(compare(floor, inputs, range(TOKENS))).verdict is Verdict.FAIL


def test_experts_that_a_router_cannot_tell_apart_may_both_be_taken(
    tmp_path: Path, write_checkpoint: WriteCheckpoint, inputs: Tensor
) -> None:
    """Two equal rows of a router give equal scores; which of the two experts comes first is an accident."""
    folder = write_checkpoint(tmp_path, "mixtral", hidden_size=64, num_local_experts=8)
    (file,) = folder.glob("*.safetensors")
    weights = safetensors_files.load_file(file)
    for name, weight in weights.items():
        if "gate.weight" in name:
            weight[5] = weight[2]
    safetensors_files.save_file(weights, file, {"format": "pt"})
    checkpoint = open_checkpoint(folder, "mixture")
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    contrary, runner = Contrary(1e-6), open_runner(checkpoint, SPAN, config)
    outputs = run_session(runner.choosing(contrary), inputs, SPAN)
    assert contrary.turned
    floor = rerun(open_reference(checkpoint, SPAN, max_tokens=128), SPAN, inputs, BF16)
    finding = judge(compare(floor, outputs, range(TOKENS)))
    assert finding.verdict in (Verdict.PASS, Verdict.INCONCLUSIVE), finding.reason


def test_opinions_of_peers_that_decided_near_ties_otherwise_make_nobody_suspect(
    mixture: Checkpoint, runner: SpanRunner, inputs: Tensor
) -> None:
    """By others' outputs nobody can try which experts a peer took; the typical token has no near tie."""
    outputs = run_session(runner.choosing(Contrary(0.008)), inputs, SPAN)
    at = tuple(range(TOKENS))
    others = [History(inputs, run_session(runner, inputs, SPAN), at)] * 3
    finding = judge_by_opinions(History(inputs, outputs, at), others, len(SPAN)).finding
    assert finding.verdict in (Verdict.PASS, Verdict.INCONCLUSIVE), finding.reason


def test_a_last_hop_that_decided_ties_of_the_prompt_otherwise_is_not_blamed(
    mixture: Checkpoint, runner: SpanRunner, inputs: Tensor
) -> None:
    """Its outputs for the prompt are not to be seen, and what its caches hold of it is in all others."""
    outputs = run_session(runner.choosing(Contrary(0.008)), inputs, SPAN)
    floor = rerun(open_reference(mixture, SPAN, max_tokens=128), SPAN, inputs, BF16)
    for start in (17, 33, 49):
        finding = judge(compare(floor, outputs[start:], range(start, TOKENS)))
        assert finding.verdict is not Verdict.FAIL, finding.reason
        lie = judge(compare(floor, inputs[start:], range(start, TOKENS)))
        assert lie.verdict is Verdict.FAIL


def test_cheats_are_found_among_experts_too(mixture: Checkpoint, runner: SpanRunner, inputs: Tensor) -> None:
    cheats = load_benchmark("cheats")
    floor = rerun(open_reference(mixture, SPAN, max_tokens=128), SPAN, inputs, BF16)
    honest = run_session(runner, inputs, SPAN)
    assert judge(compare(floor, honest, range(TOKENS))).verdict is Verdict.PASS
    tampered = honest.clone()
    tampered[40] = honest[20]
    lies: dict[str, Tensor] = {
        "other experts": run_session(runner.choosing(NextBest()), inputs, SPAN),
        "a block skipped": run_session(runner, run_session(runner, inputs, BlockSpan(0, 1)), BlockSpan(2, 3)),
        "one token": tampered,
        "the input": inputs,
    }
    for name in ("int8 per row", "nf4", "10 % pruned"):
        (lies[name],) = cheats.run_altered(mixture, SPAN, cheats.WEIGHTS[name], [inputs])
    for name, outputs in lies.items():
        finding = judge(compare(floor, outputs.float(), range(TOKENS)))
        assert finding.verdict is Verdict.FAIL, f"{name}: {finding.reason}"


@pytest.mark.parametrize("room", [128, 512])
def test_the_blocks_behind_a_span_choose_as_they_do_for_the_exact_output(
    mixture: Checkpoint, runner: SpanRunner, inputs: Tensor, room: int
) -> None:
    """In one batch or one by one; a tie that rounding decides there would look like an aimed attack."""
    span = BlockSpan(0, 2)
    tail = open_tail(mixture, span, max_tokens=room)
    floor = rerun(open_reference(mixture, span, max_tokens=128), span, inputs, BF16)
    outputs = run_session(runner, inputs, span)
    deviation = compare(floor, outputs, range(TOKENS), tail)
    assert all(chunk.logits and chunk.logits.max_rho < 7 for chunk in deviation.chunks)
    assert tail.runner is not None
    one, *others = run_sessions(tail.runner, [inputs, inputs * 1.0001, inputs], tail.span)
    assert torch.equal(one, others[-1])
    assert torch.allclose(one, others[0], rtol=0.05, atol=0.05 * float(one.abs().max()))


def load_benchmark(name: str) -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
