"""Draws of hops: what rounds is honest, another token is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from p2pinfer.models.checkpoint.checkpoint import open_checkpoint
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead, load_embedding_and_head
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.text.log_probabilities import log_probabilities
from p2pinfer.models.text.sampling import Sampler
from p2pinfer.models.text.sampling_config import SamplingConfig
from p2pinfer.models.verify.draws import measure_draws, measure_embedded, measure_logs
from p2pinfer.node.evidence.end_claims import LOGS

PASSES, FAILS = 8.0, 24.0
CONFIGS = [
    SamplingConfig(seed=0),
    SamplingConfig(temperature=0.8, seed=4),
    SamplingConfig(temperature=1.0, top_k=20, seed=5),
    SamplingConfig(temperature=1.2, top_p=0.9, min_p=0.01, seed=6),
    SamplingConfig(temperature=0.7, epsilon_cutoff=3e-4, eta_cutoff=2e-3, seed=8),
]


@pytest.fixture(scope="module")
def ends(tiny_stories: Path) -> dict[str, EmbeddingAndHead]:
    checkpoint = open_checkpoint(tiny_stories, BUNDLED_MODEL)
    return {
        dtype: load_embedding_and_head(checkpoint, ComputeConfig(device="cpu", dtype=dtype))
        for dtype in ("float32", "bfloat16", "float16")
    }


def worst(
    ends: dict[str, EmbeddingAndHead], dtype: str, config: SamplingConfig, *, forbid_best: bool = False
) -> float:
    """Deviation of draws from 40 hidden states by a hop of that dtype, which may give the best no chance."""
    hidden = torch.randn(40, ends[dtype].spec.hidden_size, generator=torch.Generator().manual_seed(1)) * 3
    logits = ends[dtype].logits(hidden)
    if forbid_best:
        logits = logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf)
    sampler = Sampler(config)
    drawn = [sampler.pick(row, index + 1) for index, row in enumerate(logits)]
    exact, at = ends["float32"], range(len(drawn))
    return measure_draws(exact, hidden, at, drawn, lambda row, _: row, config).worst


def worst_log(
    ends: dict[str, EmbeddingAndHead],
    dtype: str,
    lie: Callable[[int, float], tuple[int, float]] = lambda token, log: (token, log),
) -> float:
    """Deviation of log probabilities behind 60 hidden states, of five likely tokens and an unlikely one."""
    hidden = torch.randn(60, ends[dtype].spec.hidden_size, generator=torch.Generator().manual_seed(2)) * 3
    said: list[list[tuple[int, float]]] = []
    for index, row in enumerate(ends[dtype].logits(hidden)):
        found = log_probabilities(row, 7 * index, 5)
        said.append([(7 * index, found.token), *(lie(*each) for each in found.likeliest)])
    return measure_logs(ends["float32"], hidden, said, 5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_hop_of_any_dtype_draws_within_rounding(
    ends: dict[str, EmbeddingAndHead], dtype: str, config: SamplingConfig
) -> None:
    assert worst(ends, dtype, config) <= PASSES


@pytest.mark.parametrize("config", CONFIGS)
def test_a_hop_that_gives_another_token_is_far_off(
    ends: dict[str, EmbeddingAndHead], config: SamplingConfig
) -> None:
    assert worst(ends, "float32", config, forbid_best=True) > FAILS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_log_probabilities_of_a_hop_of_any_dtype_are_within_rounding(
    ends: dict[str, EmbeddingAndHead], dtype: str
) -> None:
    assert worst_log(ends, dtype) <= LOGS.passes


def test_log_probabilities_that_are_made_up_are_far_off(ends: dict[str, EmbeddingAndHead]) -> None:
    """Nothing else shows them: the tokens are the right ones."""
    assert worst_log(ends, "float32", lambda token, log: (token, log - 0.9)) > LOGS.fails
    assert worst_log(ends, "float32", lambda token, log: (token // 2, log)) > LOGS.fails


def test_fewer_likely_tokens_than_were_asked_for_are_infinitely_far_off(
    ends: dict[str, EmbeddingAndHead],
) -> None:
    hidden = torch.randn(1, ends["float32"].spec.hidden_size)
    said = log_probabilities(ends["float32"].logits(hidden)[0], 3, 5)
    all_ = ((3, said.token), *said.likeliest)
    assert measure_logs(ends["float32"], hidden, [all_], 5) < 1
    assert measure_logs(ends["float32"], hidden, [all_[:-1]], 5) == float("inf")
    assert measure_logs(ends["float32"], hidden, [(*all_[:-1], all_[1])], 5) == float("inf")


def test_a_token_outside_of_the_filters_is_infinitely_far_off(ends: dict[str, EmbeddingAndHead]) -> None:
    config = SamplingConfig(temperature=1.0, top_k=5, seed=1)
    hidden = torch.randn(1, ends["float32"].spec.hidden_size) * 3
    unlikely = int(ends["float32"].logits(hidden).argmin())
    found = measure_draws(ends["float32"], hidden, [7], [unlikely], lambda row, _: row, config)
    assert found.worst == float("inf") and found.position == 8


def test_typical_tokens_are_not_judged(ends: dict[str, EmbeddingAndHead]) -> None:
    config = SamplingConfig(temperature=1.0, typical_p=0.5, seed=1)
    hidden = torch.randn(1, ends["float32"].spec.hidden_size)
    assert measure_draws(ends["float32"], hidden, [0], [3], lambda row, _: row, config).tokens == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_of_other_tokens_are_far_off(ends: dict[str, EmbeddingAndHead], dtype: str) -> None:
    ids = list(range(5, 45))
    rows = ends[dtype].embed(ids).float().clone()
    assert measure_embedded(ends["float32"], ids, rows) <= 4
    rows[7] = rows[8]
    assert measure_embedded(ends["float32"], ids, rows) > 32
