from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import CheckpointError
from p2pinfer.models.compute import activations, families
from p2pinfer.models.compute.architecture import describe_architecture
from p2pinfer.models.configs.defaults import ACTIVATIONS, complete_config
from p2pinfer.models.configs.family_rules import FAMILIES

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 16,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}
NONSENSE: list[object] = [0, -1, "8", 1.5, True, 1 << 70, 10**400, [8], {}, "x" * 10_000]
SIZES = [
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
]


def rope_of(**options: Any) -> dict[str, Any]:
    rope: dict[str, Any] = complete_config("m", {**CONFIG, **options})["rope_parameters"]
    return rope


def refusal_of(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as refusal:
        complete_config("m", config)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 200
    return message


def test_every_family_that_has_defaults_has_an_adapter() -> None:
    assert families.FAMILIES.keys() == FAMILIES


def test_every_activation_that_is_let_in_is_computed() -> None:
    assert activations.ACTIVATIONS.keys() == ACTIVATIONS


@pytest.mark.parametrize("family", ["bert", "", None, ["llama"], "x" * 10_000, "a\nb"])
def test_an_unknown_family_is_refused_and_the_known_ones_are_listed(family: object) -> None:
    assert "docs/models.md lists the " in refusal_of({**CONFIG, "model_type": family})


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mamba2", "recurrent state"), ("gpt2", "position"), ("deepseek_v3", "latent vectors")],
)
def test_a_family_that_cannot_be_added_yet_is_refused_with_the_reason(family: str, reason: str) -> None:
    assert reason in refusal_of({**CONFIG, "model_type": family})


def test_quantised_weights_are_refused() -> None:
    assert "quantised" in refusal_of({**CONFIG, "quantization_config": {"quant_method": "gptq"}})


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", NONSENSE)
def test_a_size_that_makes_no_sense_is_refused(key: str, value: object) -> None:
    assert f"the config of m has the invalid value {key} = " in refusal_of({**CONFIG, key: value})


@pytest.mark.parametrize("key", sorted({*SIZES} - {"num_key_value_heads", "head_dim"}))
def test_null_is_no_size(key: str) -> None:
    assert f"value {key} = None" in refusal_of({**CONFIG, key: None})


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "0", "-1e-5", '"small"', "true"])
def test_a_norm_cannot_be_kept_from_zero_by_nonsense(value: str) -> None:
    assert "value rms_norm_eps = " in refusal_of({**CONFIG, "rms_norm_eps": json.loads(value)})


@pytest.mark.parametrize(
    ("family", "options", "key"),
    [
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act"),
        ("gemma2", {"hidden_activation": None}, "hidden_activation"),
        ("llama", {"head_dim": 5}, "head_dim"),
        ("llama", {"head_dim": None, "num_attention_heads": 16}, "head_dim"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "conv"]}, "layer_types"),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": "NaN"}, "attn_logit_softcapping"),
        ("llama", {"rope_theta": None}, "rope_theta"),
        ("llama", {"rope_theta": 1}, "rope_theta"),
        ("llama", {"rope_parameters": "linear"}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "factor"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": None}}, "factor"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "head_dim"),
        ("llama", {"rope_scaling": {"type": "longrope", "long_factor": [1, 2]}}, "short_factor"),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1, 2]}},
            "short_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [1, 0]}},
            "long_factor",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 2}},
            "partial_rotary_factor",
        ),
        ("llama", {"attention_bias": None}, "attention_bias"),
        ("qwen3", {"head_dim": None}, "head_dim"),
        ("mixtral", {"num_experts": None}, "num_local_experts"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor",
        ),
    ],
)
def test_a_value_that_no_model_has_is_refused(family: str, options: dict[str, Any], key: str) -> None:
    assert f"value {key} = " in refusal_of({**CONFIG, "model_type": family, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        {"per_layer_config": {"0": {"head_dim": 8}}},
        {"is_causal": False},
        {"is_causal": None},
        {"attention_chunk_size": 8},
        {"kv_sharing_modes": ["reuse", None]},
        {"is_encoder_decoder": True},
        {"sliding_window": 31},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {
            "model_type": "mixtral",
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"hidden_act": "prelu"},
        {"hidden_act": "xielu"},
        {"hidden_act": "sine"},
        {"model_type": "gemma2", "use_bidirectional_attention": True},
        {"model_type": "gemma2", "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
    ],
)
def test_what_nothing_here_computes_is_refused(options: dict[str, Any]) -> None:
    assert "p2pinfer does not support" in refusal_of({**CONFIG, **options})


@pytest.mark.parametrize("rope_type", ["su", "mrope", "", None, ["linear"]])
def test_a_rope_of_another_type_is_refused(rope_type: object) -> None:
    rope = {"rope_type": rope_type, "factor": 2.0}
    assert "it supports default, linear, dynamic, llama3" in refusal_of({**CONFIG, "rope_scaling": rope})


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"]},
        {"model_type": "mistral", "sliding_window": None, "layer_types": ["sliding_attention"] * 2},
        {"model_type": "gemma2", "sliding_window": None},
    ],
)
def test_a_window_of_unknown_width_is_refused(options: dict[str, Any]) -> None:
    assert "its config sets no sliding_window" in refusal_of({**CONFIG, **options})


def test_a_null_where_weights_would_be_quantised_says_that_they_are_not() -> None:
    assert complete_config("m", {**CONFIG, "quantization_config": None}) == complete_config("m", CONFIG)


def test_a_mistral_that_lists_its_layers_is_transformers_ministral() -> None:
    kinds = ["full_attention", "sliding_attention"]
    listed = {**CONFIG, "model_type": "mistral", "sliding_window": 8, "layer_types": kinds}
    complete = complete_config("m", listed)
    assert complete["layer_types"] == tuple(kinds)
    assert complete_config("m", {**listed, "model_type": "ministral"}) == complete
    old = {**listed, "layer_types": ["attention", "sliding_attention"]}
    assert complete_config("m", old) == complete


def test_experts_are_counted_by_either_name_and_one_wins() -> None:
    config = {**CONFIG, "model_type": "mixtral"}
    assert complete_config("m", {**config, "num_experts": 3})["num_local_experts"] == 3
    assert (
        complete_config("m", {**config, "num_experts": 3, "num_local_experts": 5})["num_local_experts"] == 3
    )


def test_old_spellings_of_the_rope_mean_the_same_as_the_one_of_today() -> None:
    today = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}
    for old in (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": {"type": "linear", "factor": 4.0}},
    ):
        assert rope_of(**old) == rope_of(**today) == today["rope_parameters"]


def test_the_original_context_is_said_in_the_rope_or_beside_it_or_is_the_context() -> None:
    def original(rope: dict[str, Any], **options: Any) -> Any:
        llama3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        said = rope_of(rope_scaling={**llama3, **rope}, **options)
        return said["original_max_position_embeddings"]

    assert original({}) == 32
    assert original({"original_max_position_embeddings": 16}) == 16
    assert (
        original({"original_max_position_embeddings": 16}, original_max_position_embeddings=8) == 8
    )  # as transformers has it


def test_a_key_that_the_family_does_not_read_means_nothing() -> None:
    stray = {"attn_logit_softcapping": "?", "num_local_experts": -1, "use_sliding_window": 3, "foo": "bar"}
    stray |= {"sliding_window": 32, "layer_types": ["full_attention"] * 2}  # which cut nothing off
    assert complete_config("m", {**CONFIG, **stray}) == complete_config("m", CONFIG)


def test_what_was_given_is_left_as_it_was() -> None:
    config = {**CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = deepcopy(config)
    complete_config("m", config)
    assert config == before


def test_a_complete_config_is_complete() -> None:
    complete = complete_config("m", {"model_type": "qwen3"})
    assert complete_config("m", {**complete, "layer_types": list(complete["layer_types"])}) == complete


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(FAMILIES)), st.data())
def test_any_config_is_completed_or_refused_in_a_line(family: str, data: st.DataObject) -> None:
    keys = sorted({*complete_config("m", {"model_type": family}), "rope_scaling", "use_sliding_window"})
    config = data.draw(st.dictionaries(st.sampled_from(keys), JSON))
    try:
        complete = complete_config("m", {**config, "model_type": family})
    except CheckpointError as refusal:
        assert "\n" not in str(refusal)
        assert len(str(refusal)) < 200
    else:
        describe_architecture(complete)
