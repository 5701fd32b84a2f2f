"""The rules against transformers' own list of processors, and draws after them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pinfer.errors import ConfigError
from p2pinfer.models.text.processors import LogitsRules, Processors
from p2pinfer.models.text.sampling import Sampler, SamplingConfig, candidates

VOCAB = 40
EOS = (2, 5)

rules = st.fixed_dictionaries(
    {},
    optional={
        "sequence_bias": st.lists(
            st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.floats(-9, 9)),
            min_size=1,
            max_size=6,
            unique_by=lambda each: tuple(each[0]),
        ),
        "encoder_repetition_penalty": st.floats(0.5, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "no_repeat_ngram_size": st.integers(0, 3),
        "encoder_no_repeat_ngram_size": st.integers(0, 3),
        "bad_words_ids": st.lists(
            st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=5
        ).filter(lambda words: any(word not in ([2], [5]) for word in words)),
        "min_length": st.integers(0, 12),
        "min_new_tokens": st.integers(0, 6),
        "forced_bos_token_id": st.integers(0, VOCAB - 1),
        "forced_eos_token_id": st.sampled_from([2, [2, 5]]),
        "remove_invalid_values": st.booleans(),
        "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(1, 1.5)),
        "suppress_tokens": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
        "begin_suppress_tokens": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    },
).filter(lambda said: transformers_takes(said))
draws = st.fixed_dictionaries(
    {"temperature": st.floats(0.1, 3)},
    optional={
        "top_h": st.floats(0.05, 1),
        "top_k": st.integers(1, 50),
        "top_p": st.floats(0.05, 0.99),
        "min_p": st.floats(0, 0.5),
        "typical_p": st.floats(0.05, 0.99),
        "epsilon_cutoff": st.floats(0.001, 0.3),
        "eta_cutoff": st.floats(0.001, 0.3),
    },
)


@pytest.fixture(scope="module")
def model() -> Any:
    config: Any = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return transformers.LlamaForCausalLM(config)


def transformers_takes(said: dict[str, Any]) -> bool:
    """It refuses what forces tokens that are all suppressed."""
    forced = [said.get("forced_bos_token_id"), said.get("forced_eos_token_id")]
    sets: list[set[int]] = [
        {each} if isinstance(each, int) else set(each) for each in forced if each is not None
    ]
    return not any(each <= set(said.get("suppress_tokens", ())) for each in sets)


def processed(model: Any, ids: list[int], prompt: int, logits: Tensor, said: dict[str, Any]) -> Tensor:
    """The scores (vocab,) that transformers' `generate` would choose from."""
    made: Any = transformers.GenerationConfig
    config = made(**said, eos_token_id=list(EOS), max_new_tokens=8)
    config.max_length = prompt + 8  # as `_prepare_generated_length` leaves it
    if config.min_new_tokens:
        config.min_length = prompt + config.min_new_tokens
    model._prepare_special_tokens(config, device=logits.device)
    tokens = torch.tensor([ids])
    processors = model._get_logits_processor(
        config, prompt, encoder_input_ids=tokens[:, :prompt], device="cpu", model_kwargs={}
    )
    scores: Tensor = processors(tokens, logits[None].clone())[0]
    return scores


def our_rules(said: dict[str, Any]) -> LogitsRules:
    def frozen(value: Any) -> Any:
        many: Any = value
        return tuple(map(frozen, many)) if isinstance(value, (list, tuple)) else value

    said = {name: frozen(value) for name, value in said.items()}
    if isinstance(said.get("forced_eos_token_id"), int):
        said["forced_eos_token_id"] = (said["forced_eos_token_id"],)
    return LogitsRules(**said)


@st.composite
def texts(draw: st.DrawFn) -> tuple[list[int], int, Tensor]:
    """Some ids, how many of them are the prompt, and logits."""
    ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    prompt = draw(st.integers(max(1, len(ids) - 8), len(ids)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    return ids, prompt, torch.randn(VOCAB, generator=generator) * 4


@given(said=rules, text=texts())
@settings(max_examples=300)
def test_processed_logits_are_those_of_transformers(
    model: Any, said: dict[str, Any], text: tuple[list[int], int, Tensor]
) -> None:
    ids, prompt, logits = text
    before = logits.clone()
    expected = processed(model, ids, prompt, logits, said)
    apply = Processors(our_rules(said), ids[:prompt], prompt + 8, EOS)
    if expected.max() == -math.inf:
        with pytest.raises(ConfigError, match="every next token is forbidden"):
            apply(logits, ids)
    else:
        assert torch.equal(apply(logits, tuple(ids)), expected)
    assert torch.equal(logits, before)


@given(said=rules, drawn=draws, text=texts())
@settings(max_examples=300)
def test_what_is_drawn_from_is_what_transformers_draws_from(
    model: Any, said: dict[str, Any], drawn: dict[str, Any], text: tuple[list[int], int, Tensor]
) -> None:
    ids, prompt, logits = text
    said = {name: value for name, value in said.items() if name != "remove_invalid_values"}
    unset = {"top_k": 0}  # its own default is 50
    scores = processed(model, ids, prompt, logits, {**unset, **drawn, **said, "do_sample": True})
    if scores.max() == -math.inf:
        return
    expected = scores.softmax(0)
    allowed = Processors(our_rules(said), ids[:prompt], prompt + 8, EOS)(logits, ids)
    token_ids, probabilities = candidates(allowed, SamplingConfig(**drawn))
    found = torch.zeros(VOCAB).index_add(0, token_ids, probabilities)
    # Where a token's share decides by less than a rounding error, either answer is right.
    differ = (found > 0) != (expected > 0)
    # More than one token where their shares together are below rounding: so it is with top_h=1.0.
    assert differ.sum() <= 1 or float((expected + found)[differ].sum()) < 1e-5
    assert torch.allclose(found, expected, atol=1e-5 + float(expected[differ].sum() + found[differ].sum()))


def test_a_penalty_reaches_tokens_that_the_head_does_not_know() -> None:
    """An embedding may have more rows than the head, and a tokenizer more tokens than either."""
    apply = Processors(LogitsRules(repetition_penalty=2.0, suppress_tokens=(99, -1)), (1, 99), 10, ())
    assert apply(torch.tensor([1.0, 4.0, -1.0]), (1, 99, 2)).tolist() == [1.0, 2.0, -2.0]


def test_without_rules_the_logits_are_taken_as_they_are() -> None:
    logits = torch.randn(9)
    assert Processors(LogitsRules(), (1,), 10, EOS)(logits, (1, 2)) is logits


def test_what_is_forbidden_is_never_drawn_not_even_by_rounding() -> None:
    apply = Processors(LogitsRules(suppress_tokens=(0, 3, 7)), (1,), 10, EOS)
    sampler = Sampler(SamplingConfig(temperature=2.0, seed=1))
    drawn = {sampler.pick(apply(torch.zeros(8), (1,)), position) for position in range(200)}
    assert drawn == {1, 2, 4, 5, 6}


@pytest.mark.parametrize(
    "wrong",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"encoder_repetition_penalty": -1.0},
        {"no_repeat_ngram_size": -1},
        {"min_new_tokens": -3},
        {"sequence_bias": (((), 1.0),)},
        {"sequence_bias": (((1,), math.nan),)},
        {"sequence_bias": (((1,), math.inf),)},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be|makes no sense"):
        LogitsRules(**wrong)
