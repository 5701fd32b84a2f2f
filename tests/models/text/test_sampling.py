from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process

from p2pinfer.errors import ConfigError
from p2pinfer.models.text.sampling import Sampler, SamplingConfig, candidates


def random_logits(seed: int, vocab: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab, generator=generator) * 4


def warped(logits: Tensor, config: SamplingConfig) -> Tensor:
    """The probabilities (vocab,) that transformers draws from."""
    warpers: list[Any] = [logits_process.TemperatureLogitsWarper(config.temperature)]
    if config.top_k:
        warpers.append(logits_process.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(config.top_p))
    scores = logits[None]
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0].softmax(0)


@given(
    seed=st.integers(0, 1 << 30),
    vocab=st.sampled_from([1, 2, 50, 3000]),
    temperature=st.floats(0.05, 5),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    top_k=st.one_of(st.just(0), st.integers(1, 4000)),
)
def test_the_candidates_are_those_of_transformers(
    seed: int, vocab: int, temperature: float, top_p: float, top_k: int
) -> None:
    config = SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k)
    logits = random_logits(seed, vocab)
    expected = warped(logits, config)
    token_ids, probabilities = candidates(logits, config)
    found = torch.zeros(vocab).index_add(0, token_ids, probabilities)
    # Where a token's share decides by less than a rounding error, either answer is right.
    differ = (found > 0) != (expected > 0)
    assert differ.sum() <= 1
    assert torch.allclose(found, expected, atol=1e-5 + float(expected[differ].sum() + found[differ].sum()))


def test_a_share_that_rounding_never_reaches_keeps_all() -> None:
    logits = torch.zeros(3000)
    token_ids, _ = candidates(logits, SamplingConfig(temperature=1, top_p=1 - 1e-15))
    assert torch.equal(token_ids.sort().values, torch.arange(3000))


def test_greedy_takes_the_likeliest_whatever_else_is_set() -> None:
    logits = random_logits(0, 100)
    sampler = Sampler(SamplingConfig(top_p=0.5, top_k=3, seed=1))
    assert {sampler.pick(logits, position) for position in range(20)} == {int(logits.argmax())}


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.zeros(1000)
    sampler = Sampler(SamplingConfig(temperature=1, seed=7))
    drawn = [sampler.pick(logits, position) for position in range(50)]
    again = Sampler(SamplingConfig(temperature=1, seed=7))
    assert [again.pick(logits, position) for position in reversed(range(50))] == drawn[::-1]
    assert len(set(drawn)) > 40
    assert Sampler(SamplingConfig(temperature=1, seed=8)).pick(logits, 0) != drawn[0]


def split_mix(state: int, count: int) -> list[int]:
    """SplitMix64 as its authors wrote it, on integers without bounds."""
    mask, outputs = (1 << 64) - 1, list[int]()
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(mixed ^ (mixed >> 31))
    return outputs


@given(seed=st.integers(0, (1 << 64) - 1), position=st.integers(0, 1 << 20))
def test_draws_never_change_between_versions(seed: int, position: int) -> None:
    """A generation that moves to a client of another version must go on as it began.

    So the draw is worked out here again, in another way: the largest score with Gumbel's noise on it.
    """
    logits = random_logits(position, 40)
    key = int.from_bytes(blake3(f"{seed}:{position}".encode()).digest(length=8), "little")
    heated = [float(each) for each in logits.double() / 1.5]
    scores = [
        logit - math.log(-math.log(((bits >> 12) + 0.5) / 2**52))
        for logit, bits in zip(heated, split_mix(key, 40), strict=True)
    ]
    drawn = Sampler(SamplingConfig(temperature=1.5, seed=seed)).pick(logits, position)
    assert scores[drawn] == pytest.approx(max(scores), abs=1e-5)  # probabilities are float32


@pytest.mark.parametrize("config", [{}, {"top_p": 0.9}, {"top_k": 20}, {"temperature": 0.5, "min_p": 0.02}])
@pytest.mark.parametrize("apart", [0.01, 0.3])
def test_logits_that_differ_by_rounding_draw_the_same_token(config: dict[str, Any], apart: float) -> None:
    """Apart at most as often as the bound of Daliri et al. says: 2 TV / (1 + TV)."""
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 5, **config}
    sampler = Sampler(SamplingConfig(**settings))
    logits = random_logits(9, 200) / 2
    moved = logits + apart * random_logits(10, 200) / 4
    one, other = (
        torch.zeros(200).index_add(0, *candidates(each, sampler.config)) for each in (logits, moved)
    )
    bound = float(2 / (1 + 1 / ((one - other).abs().sum() / 2)))
    draws = 1500
    differ = sum(sampler.pick(logits, i) != sampler.pick(moved, i) for i in range(draws))
    assert differ <= bound * draws + 4 * math.sqrt(bound * draws) + 1
    assert differ > 0 or apart < 0.1  # otherwise the comparison would mean nothing


def test_without_a_seed_every_sampler_draws_its_own() -> None:
    config = SamplingConfig(temperature=1)
    seeds = {Sampler(config).seed for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.parametrize("by", ["position", "seed"])
@pytest.mark.parametrize("config", [{}, {"temperature": 2.0}, {"top_p": 0.8}, {"top_k": 3}])
def test_tokens_come_as_often_as_their_probability_says(config: dict[str, float], by: str) -> None:
    logits = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.07, 0.03]).log()
    settings: dict[str, Any] = {"temperature": 1.0, **config}
    count = 3000
    draws = [
        Sampler(SamplingConfig(**settings, seed=i if by == "seed" else 3)).pick(
            logits, 7 if by == "seed" else i
        )
        for i in range(count)
    ]
    counts = torch.bincount(torch.tensor(draws), minlength=6)
    shares = warped(logits, SamplingConfig(**settings))
    chi_square = ((counts - count * shares) ** 2 / (count * shares))[shares > 0].sum()
    assert chi_square < 35  # six tokens: passed by chance once in 600,000 times
    assert not counts[shares == 0].any()


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.full((8,), -torch.inf)
    logits[[2, 5]] = 0.0
    sampler = Sampler(SamplingConfig(temperature=0.7, top_k=4, seed=0))
    assert {sampler.pick(logits, position) for position in range(60)} == {2, 5}


def test_the_least_temperature_is_as_good_as_greedy() -> None:
    logits = random_logits(1, 100)
    assert Sampler(SamplingConfig(temperature=1e-40)).pick(logits, 0) == int(logits.argmax())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SamplingConfig(**wrong)
