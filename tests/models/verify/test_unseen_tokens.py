"""Last hops of deep mixtures: what routers did with the prompt shows in no output, yet moves all others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from p2pinfer.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from p2pinfer.models.compute.embedding_and_head import load_embedding_and_head
from p2pinfer.models.compute.runner import open_runner
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.experts import RoutingLog, draw_unseen, swayed_noise
from p2pinfer.models.verify.logits import LogitEffect, measure_effect
from p2pinfer.models.verify.reference import Tail, open_reference
from p2pinfer.models.verify.sessions import run_session
from p2pinfer.models.verify.verify import compare, rerun
from p2pinfer.reputation.verdict import Verdict, judge

from ..conftest import WriteCheckpoint

safetensors_files: Any = safetensors.torch  # untyped
BLOCKS = 12
SPAN = BlockSpan(0, BLOCKS)
TOKENS = 97
SEEN = 65  # the last tokens, whose outputs are returned
BF16 = torch.bfloat16


def a_log(scores: Tensor, blocks: int) -> RoutingLog:
    log = RoutingLog()
    for block in range(blocks):
        log.choose(block, scores, 2)
    return log


@pytest.fixture(scope="module", params=[1.0, 0.6])
def decisive(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_checkpoint: WriteCheckpoint,
) -> Checkpoint:
    """A mixture whose routers have clear favourites, as trained ones have; with 1.0 it is near chaos."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("decisive"),
        "mixtral",
        hidden_size=64,
        num_local_experts=8,
        num_hidden_layers=BLOCKS,
    )
    (file,) = Path(folder).glob("*.safetensors")
    weights = safetensors_files.load_file(file)
    for name, weight in weights.items():
        if "gate.weight" in name:
            weight *= 8
        elif "layers" in name and "norm" not in name:
            weight *= request.param
    safetensors_files.save_file(weights, file, {"format": "pt"})
    return open_checkpoint(folder, "decisive")


def inputs_of(checkpoint: Checkpoint, seed: int) -> Tensor:
    ends = load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype="float32"))
    rng = random.Random(seed)
    return (20 * ends.embed([rng.randrange(199) for _ in range(TOKENS)])).to(BF16).float()


@pytest.mark.slow
def test_an_honest_last_hop_of_many_blocks_is_not_blamed(
    request: pytest.FixtureRequest, decisive: Checkpoint
) -> None:
    is_chaotic = "1.0" in request.node.name
    ends = load_embedding_and_head(decisive, ComputeConfig(device="cpu", dtype="float32"))
    reference = open_reference(decisive, SPAN, max_tokens=TOKENS)
    config = ComputeConfig(device="cpu", dtype="bfloat16", cache_bytes=1 << 24)
    runner = open_runner(decisive, SPAN, config)
    at = range(TOKENS - SEEN, TOKENS)
    inputs = inputs_of(decisive, 1)
    floor = rerun(reference, SPAN, inputs, BF16)
    honest = run_session(runner, inputs, SPAN).to(BF16).float()
    finding = judge(compare(floor, honest[-SEEN:], at, Tail(None, ends)))
    assert finding.verdict in (Verdict.PASS, Verdict.INCONCLUSIVE), finding.reason
    skipped = run_session(runner, run_session(runner, inputs, BlockSpan(0, 5)), BlockSpan(6, BLOCKS))
    lie = judge(compare(floor, skipped[-SEEN:], at)).verdict
    # Where each token hangs in the balance of many experts, more attempts would be needed than are made.
    assert lie is Verdict.FAIL or (is_chaotic and lie is Verdict.INCONCLUSIVE)


def test_each_near_tie_of_an_unseen_token_is_drawn_once() -> None:
    """With coins, ties of the last blocks of a deep span were left out."""
    tied = torch.tensor([[3.0, 2.0, 1.999, -1.0]]).repeat(4, 1)
    noise = {block: torch.full((4,), 0.001) for block in range(6)}
    draws = draw_unseen(a_log(tied, 6), [1, 2], noise, 6, random.Random(0))
    for token in (1, 2):
        drawn = sorted(block for draw in draws for block in draw.get(token, {}))
        assert drawn == list(range(6))
    assert all({*draw} <= {1, 2} and all(len(path) == 1 for path in draw.values()) for draw in draws)
    clear = torch.tensor([[3.0, 2.0, 1.9, -1.0]]).repeat(4, 1)
    assert draw_unseen(a_log(clear, 6), [1, 2], noise, 6, random.Random(0)) == []


def test_tokens_that_are_seen_keep_their_experts_where_others_are_drawn() -> None:
    """Else a swap of theirs that a draw brings about would count as noise, and hide that it is missing."""
    base = a_log(torch.tensor([[3.0, 2.0, 1.0, -1.0]]).repeat(4, 1), 1)
    moved = torch.tensor([[-3.0, 2.0, 1.0, 3.0]]).repeat(4, 1)
    log = RoutingLog({1: {0: (0, 1)}}, follow=base, followers=[2, 3])
    parts = [log.choose(0, part, 2) for part in (moved[:3], moved[3:])]  # a session comes in pieces
    assert torch.cat(parts).tolist() == [[3, 1], [0, 1], [0, 1], [0, 1]]


def test_the_noise_of_a_router_includes_what_draws_move_its_scores_by() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, -1.0]]).repeat(2, 1)
    noise = {0: torch.full((2,), 0.3)}
    moved = scores.clone()
    moved[1] += torch.tensor([0.4, -0.4, 0.4, -0.4])
    swayed = swayed_noise(noise, a_log(scores, 1), [a_log(moved, 1), a_log(scores + 7, 1)])
    assert torch.allclose(swayed[0], torch.tensor([0.3, 0.5]))


def test_what_draws_do_to_the_logits_is_noise(decisive: Checkpoint) -> None:
    ends = load_embedding_and_head(decisive, ComputeConfig(device="cpu", dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(32, 64, generator=generator)
    rounded = exact + 0.001 * torch.randn(32, 64, generator=generator)
    drawn = exact + 0.1 * torch.randn(32, 64, generator=generator)
    for output in (drawn, exact + 0.1 * torch.randn(32, 64, generator=generator)):
        without = measure_effect(ends, [exact, rounded, output])
        with_draws = measure_effect(ends, [exact, rounded, output], [drawn])
        assert float(without.rho.median()) > 20
        assert float(with_draws.rho.max()) < 4
        assert with_draws.part(slice(0, 32)).flip_margin <= without.part(slice(0, 32)).flip_margin


@pytest.mark.parametrize(
    ("gap", "doubtful", "margin", "lost"), [(0.5, 0, 0.0, 0), (2, 0, 0.0, 1), (5, 0, 0.9, 1), (5, 1, 0.0, 0)]
)
def test_a_lost_lead_counts_if_rounding_does_not_take_such_leads(
    gap: float, doubtful: int, margin: float, lost: int
) -> None:
    """Where logits are far apart, rounding alone takes leads of 0.9, and so does a router's near tie."""
    token = torch.tensor([0.9])
    effect = LogitEffect(torch.ones(1), token, torch.tensor([gap]), torch.tensor([bool(doubtful)]))
    found = effect.part(slice(0, 1))
    assert found.flip_margin == pytest.approx(margin)
    assert found.lost_leads == lost
