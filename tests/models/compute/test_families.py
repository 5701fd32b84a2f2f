from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from p2pinfer.models.compute.activations import ACTIVATIONS
from p2pinfer.models.compute.architecture import Architecture, describe_architecture
from p2pinfer.models.compute.families import FAMILIES
from p2pinfer.models.configs.defaults import complete_config


def architecture(family: str, **options: Any) -> Architecture:
    config = {"model_type": family, "num_hidden_layers": 4, **options}
    return describe_architecture(complete_config("m", config))


def architecture_by_transformers(config: dict[str, Any]) -> Architecture:
    """What transformers' own class makes of a config.json."""
    family: Any = CONFIG_MAPPING[config["model_type"]]
    read = family.from_dict(deepcopy(config))
    head_dim = getattr(read, "head_dim", None) or read.hidden_size // read.num_attention_heads
    window = getattr(read, "sliding_window", None)
    layer_types = getattr(read, "layer_types", None) or ["sliding_attention"] * read.num_hidden_layers
    return Architecture(
        family=FAMILIES[read.model_type],
        hidden_size=read.hidden_size,
        inner_size=read.intermediate_size,
        heads=read.num_attention_heads,
        kv_heads=read.num_key_value_heads,
        head_dim=head_dim,
        norm_eps=read.rms_norm_eps,
        activation=ACTIVATIONS[getattr(read, "hidden_activation", None) or read.hidden_act],
        attention_scale=getattr(read, "query_pre_attn_scalar", head_dim) ** -0.5,
        attention_softcap=getattr(read, "attn_logit_softcapping", None),
        logit_softcap=getattr(read, "final_logit_softcapping", None),
        windows=tuple(window if kind == "sliding_attention" else None for kind in layer_types),
        num_experts=getattr(read, "num_local_experts", 0),
        expert_size=read.intermediate_size if read.model_type == "mixtral" else 0,
        experts_per_token=getattr(read, "num_experts_per_tok", 0),
        query_bias=getattr(read, "attention_bias", read.model_type == "qwen2"),
        output_bias=getattr(read, "attention_bias", False),
        mlp_bias=getattr(read, "mlp_bias", False),
        embedding_scale=read.hidden_size**0.5 if FAMILIES[read.model_type].scaled_embedding else 1.0,
        tied_head=read.tie_word_embeddings,
    )


_KINDS = st.sampled_from(["sliding_attention", "full_attention"])
_WINDOW = st.none() | st.integers(1, 9999)
_CAP = st.none() | st.floats(1, 99)
_EVERY_FAMILY: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.just(500),
    "hidden_size": st.sampled_from([512, 768]),
    "intermediate_size": st.integers(1, 9999),
    "num_attention_heads": st.sampled_from([16, 32]),
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([64, 80]),
    "hidden_act": st.sampled_from(["silu", "gelu", "relu2"]),
    "rms_norm_eps": st.floats(1e-9, 1e-3),
    "tie_word_embeddings": st.booleans(),
    "max_position_embeddings": st.integers(1, 1 << 30),
}
_QWEN: dict[str, st.SearchStrategy[Any]] = {
    "use_sliding_window": st.booleans(),
    "sliding_window": _WINDOW,
    "max_window_layers": st.integers(0, 40),
}
_BY_FAMILY: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "llama": {
        "num_key_value_heads": st.sampled_from([None, 1, 2]),
        "head_dim": st.sampled_from([None, 64]),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
    },
    "mistral": {"sliding_window": _WINDOW, "head_dim": st.sampled_from([None, 64])},
    "mixtral": {
        "sliding_window": _WINDOW,
        "head_dim": st.sampled_from([None, 64]),
        "num_local_experts": st.integers(2, 9),
        "num_experts_per_tok": st.integers(1, 2),
    },
    "qwen2": {"num_key_value_heads": st.sampled_from([None, 1, 2]), **_QWEN},
    "qwen3": {
        "num_key_value_heads": st.sampled_from([None, 1, 2]),
        "attention_bias": st.booleans(),
        **_QWEN,
    },
    "gemma2": {
        "attention_bias": st.booleans(),
        "hidden_activation": st.sampled_from(["gelu", "gelu_pytorch_tanh"]),
        "query_pre_attn_scalar": st.integers(1, 999),
        "sliding_window": st.integers(1, 9999),
        "attn_logit_softcapping": _CAP,
        "final_logit_softcapping": _CAP,
    },
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json that leaves out what it likes."""
    family = draw(st.sampled_from(sorted(_BY_FAMILY)))
    keys = {**_EVERY_FAMILY, **_BY_FAMILY[family]}
    blocks = draw(st.none() | st.integers(1, 40))
    if blocks is not None and family in {"qwen2", "qwen3", "gemma2"}:
        keys["layer_types"] = st.none() | st.lists(_KINDS, min_size=blocks, max_size=blocks)
    config: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=keys))
    if blocks is not None:
        config["num_hidden_layers"] = blocks
    return {"model_type": family, **config}


@given(configs())
def test_what_a_config_leaves_out_is_what_transformers_would_fill_in(config: dict[str, Any]) -> None:
    expected = architecture_by_transformers(config)
    assume(expected.heads % expected.kv_heads == 0)  # qwen2's 32 may be left out beside 16 heads
    width = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    if config["model_type"] in {"qwen2", "qwen3"} and width is None:
        assume("sliding_attention" not in (config.get("layer_types") or ()))  # no model runs like that
    assert describe_architecture(complete_config("m", config)) == expected


@pytest.mark.parametrize("family", _BY_FAMILY)
def test_a_config_that_says_nothing_is_its_familys_own(family: str) -> None:
    config = {"model_type": family}
    complete = complete_config("m", config)
    assert describe_architecture(complete) == architecture_by_transformers(config)
    read: Any = CONFIG_MAPPING[family]()
    assert complete["vocab_size"] == read.vocab_size
    assert complete["max_position_embeddings"] == read.max_position_embeddings
    assert complete["rope_parameters"] == read.rope_parameters


def test_windows_are_those_of_each_block() -> None:
    def windows(family: str, **options: Any) -> tuple[int | None, ...]:
        return architecture(family, **options).windows

    assert windows("llama") == (None,) * 4
    assert windows("mistral", sliding_window=9) == (9,) * 4
    assert windows("mistral", sliding_window=None) == (None,) * 4
    assert windows("gemma2", sliding_window=9) == (9, None, 9, None)
    assert windows("qwen2", sliding_window=9) == (None,) * 4
    sliding = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}
    assert windows("qwen3", **sliding) == (None, None, None, 9)


def test_numbers_come_from_the_config_where_it_has_them() -> None:
    gemma = architecture("gemma2", query_pre_attn_scalar=144, hidden_size=256)
    assert gemma.attention_scale == 1 / 12
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.embedding_scale) == (50, 30, 16)
    llama = architecture("llama", hidden_size=256, num_attention_heads=4, head_dim=None)
    assert (llama.head_dim, llama.attention_scale, llama.embedding_scale) == (64, 1 / 8, 1)
    assert llama.attention_softcap is llama.logit_softcap is None
