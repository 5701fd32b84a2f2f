"""Every option of six families' configs in transformers: what it is set to here, and what must come of it.

An option is honoured, has no effect on the numbers, or is refused. Honoured ones are tried with values that
visibly change what transformers computes; the refused ones are those of docs/write_models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Config: TypeAlias = Mapping[str, Any]

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2")
SLIDING, FULL = "sliding_attention", "full_attention"
ORIGINAL = "original_max_position_embeddings"

_COMMON: Config = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BASES: Mapping[str, Config] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "head_dim": 16, "sliding_window": 12},
    "mixtral": {**_COMMON, "head_dim": 16, "num_local_experts": 4},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 16},
    "gemma2": {
        **_COMMON,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 12,
        "tie_word_embeddings": False,  # tied ones make a model that repeats itself
    },
}


@dataclass(frozen=True)
class Variant:
    """Changes of a family's base that change the logits, against the base or against other changes."""

    name: str
    changes: Config
    against: Config = field(default_factory=dict[str, Any])


def _rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **settings}}


def _old(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_theta": 10_000.0, "rope_scaling": {"type": rope_type, **settings}}


_AT_40 = {ORIGINAL: 40}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_OTHER_THETA = _rope("default", rope_theta=50.0)
_LLAMA3_OF_64 = _rope("llama3", **_LLAMA3)
_YARN = _rope("yarn", factor=4.0, **_AT_40)
_LONG = {"short_factor": [1.0] * 4 + [1.5] * 4, "long_factor": [2.0] * 4 + [8.0] * 4}
_LONGROPE = _rope("longrope", **_LONG, **_AT_40)
_LINEAR = _rope("linear", factor=2.0)

# Of every family. Prompts are shorter than 40 tokens, texts longer.
ROPES = (
    Variant("theta inside", _rope("default", rope_theta=500.0)),
    Variant("theta beside", {"rope_theta": 500.0}),
    Variant(
        "theta in both", {"rope_theta": 50.0, "rope_scaling": {"rope_type": "default", "rope_theta": 500.0}}
    ),
    Variant("linear", _LINEAR),
    Variant("linear by its old name", _old("linear", factor=2.0)),
    Variant("linear under the old key", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    Variant(
        "linear by both names", {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}}
    ),
    Variant(
        "two dicts",
        {**_OTHER_THETA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        _OTHER_THETA,
    ),
    Variant("an empty old dict", {**_LINEAR, "rope_scaling": {}}),
    Variant("no old dict", {**_LINEAR, "rope_scaling": None}),
    Variant("linear that shrinks", _rope("linear", factor=0.5)),
    Variant("llama3", _rope("llama3", **_LLAMA3, **_AT_40)),
    Variant("llama3, length beside", {**_LLAMA3_OF_64, ORIGINAL: 24}, _rope("llama3", **_LLAMA3)),
    Variant("llama3, length left out", _LLAMA3_OF_64),
    Variant("llama3, old spelling", _old("llama3", **_LLAMA3, **_AT_40)),
    Variant(
        "llama3, low", _rope("llama3", **{**_LLAMA3, "low_freq_factor": 3.0}), _rope("llama3", **_LLAMA3)
    ),
    Variant(
        "llama3, high", _rope("llama3", **{**_LLAMA3, "high_freq_factor": 16.0}), _rope("llama3", **_LLAMA3)
    ),
    Variant("yarn", _YARN),
    Variant("yarn, length beside", {**_rope("yarn", factor=4.0), ORIGINAL: 100}, _YARN),
    Variant("yarn, two lengths", {**_YARN, ORIGINAL: 100}, _YARN),
    Variant("yarn, length left out", _rope("yarn", factor=4.0), _YARN),
    Variant("yarn, old spelling", _old("yarn", factor=8.0, **_AT_40), _YARN),
    Variant("yarn, factor derived", _rope("yarn", factor=None, **_AT_40), _YARN),
    Variant("yarn, weighed", _rope("yarn", factor=4.0, mscale=0.5, mscale_all_dim=2.0, **_AT_40), _YARN),
    Variant("yarn, attention", _rope("yarn", factor=4.0, attention_factor=0.7, **_AT_40), _YARN),
    Variant("yarn, fast", _rope("yarn", factor=4.0, beta_fast=2, **_AT_40), _YARN),
    Variant("yarn, slow", _rope("yarn", factor=4.0, beta_slow=0.5, **_AT_40), _YARN),
    Variant("yarn, not truncated", _rope("yarn", factor=4.0, truncate=False, **_AT_40), _YARN),
    Variant("yarn, truncate null", _rope("yarn", factor=4.0, truncate=None, **_AT_40), _YARN),
    Variant("dynamic", {**_rope("dynamic", factor=2.0), "max_position_embeddings": 40}),
    Variant("dynamic, old spelling", {**_old("dynamic", factor=4), "max_position_embeddings": 40}),
    Variant(
        "dynamic, shorter",
        {**_rope("dynamic", factor=2.0), "max_position_embeddings": 37},
        {**_rope("dynamic", factor=2.0), "max_position_embeddings": 42},
    ),
    Variant("longrope", _LONGROPE),
    Variant("longrope, length beside", {**_rope("longrope", **_LONG), ORIGINAL: 38}, _LONGROPE),
    Variant(
        "longrope, length left out", {**_rope("longrope", **_LONG), "max_position_embeddings": 44}, _LONGROPE
    ),
    Variant("longrope, factor", _rope("longrope", factor=4.0, **_LONG, **_AT_40), _LONGROPE),
    Variant("longrope, attention", _rope("longrope", attention_factor=1.5, **_LONG, **_AT_40), _LONGROPE),
    Variant("proportional", _rope("proportional", factor=2.0)),
    Variant("proportional in part", _rope("proportional", partial_rotary_factor=0.5)),
    Variant("proportional, part beside", {**_rope("proportional"), "partial_rotary_factor": 0.5}),
)
# What of the rope changes nothing: against which it is tried, and what it is.
ROPES_WITHOUT_EFFECT: tuple[tuple[Config, Config], ...] = (
    ({}, {"rope_parameters": None, "rope_scaling": None}),
    ({}, _rope("default", factor=4.0, mrope_section=[2, 3, 3])),
    ({}, {ORIGINAL: 24}),
    (_YARN, _rope("yarn", factor=4.0, mscale=0.5, **_AT_40)),
    (_YARN, _rope("yarn", factor=4.0, mscale=0, mscale_all_dim=2.0, **_AT_40)),
    (_YARN, _rope("yarn", factor=4.0, beta_fast=None, beta_slow=0, attention_factor=None, **_AT_40)),
    (_LINEAR, {**_LINEAR, "max_position_embeddings": 24}),
)

_SHAPES = (
    Variant("vocab_size", {"vocab_size": 61}),
    Variant("hidden_size", {"hidden_size": 96}),
    Variant("intermediate_size", {"intermediate_size": 80}),
    Variant("num_hidden_layers", {"num_hidden_layers": 3}),
    Variant("num_attention_heads", {"num_attention_heads": 8}),
    Variant("num_key_value_heads", {"num_key_value_heads": 1}),
    Variant("num_key_value_heads, all", {"num_key_value_heads": 4}),
    Variant("head_dim", {"head_dim": 24}),
    Variant("rms_norm_eps", {"rms_norm_eps": 0.3}),
    Variant("tie_word_embeddings", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
)
_ACTIVATIONS = (
    Variant("hidden_act", {"hidden_act": "quick_gelu"}),
    Variant("hidden_act relu", {"hidden_act": "relu"}),
)
_NULL_HEADS = (Variant("num_key_value_heads, null", {"num_key_value_heads": None}),)
_NULL_SIZE = (Variant("head_dim, null", {"head_dim": None, "num_attention_heads": 2}),)
_BIAS = (Variant("attention_bias", {"attention_bias": True}),)
_QWEN_WINDOWS = (
    Variant("a window", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    Variant("a window above", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    Variant(
        "a window by list",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING, FULL]},
    ),
    Variant(
        "a window by a list of old",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["attention", SLIDING]},
    ),
)

HONOURED: Mapping[str, tuple[Variant, ...]] = {
    "llama": (
        *_SHAPES,
        *_ACTIVATIONS,
        *_NULL_HEADS,
        *_NULL_SIZE,
        *_BIAS,
        Variant("mlp_bias", {"mlp_bias": True}),
    ),
    "mistral": (
        *_SHAPES,
        *_ACTIVATIONS,
        *_NULL_SIZE,
        Variant("sliding_window", {"sliding_window": 5}),
        Variant("sliding_window, null", {"sliding_window": None}),
        Variant("layer_types", {"layer_types": [SLIDING, FULL]}),
        Variant("layer_types, all full", {"layer_types": [FULL, FULL]}),
        Variant("layer_types, old name", {"layer_types": ["attention", SLIDING]}),
        Variant("layer_types, all sliding", {"layer_types": [SLIDING] * 2, "sliding_window": 5}),
        Variant("layer_types, null", {"layer_types": None, "sliding_window": 5}),
        Variant("ministral", {"model_type": "ministral", "layer_types": [FULL, SLIDING]}),
    ),
    "mixtral": (
        *_SHAPES,
        *_ACTIVATIONS,
        *_NULL_SIZE,
        Variant("sliding_window", {"sliding_window": 8}),
        Variant("sliding_window and stray types", {"sliding_window": 8, "layer_types": [FULL, FULL]}),
        Variant("num_experts_per_tok", {"num_experts_per_tok": 1}),
        Variant("num_local_experts", {"num_local_experts": 3}),
        Variant("num_experts wins", {"num_experts": 3}),
    ),
    "qwen2": (*_SHAPES, *_ACTIVATIONS, *_NULL_HEADS, *_QWEN_WINDOWS),
    "qwen3": (*_SHAPES, *_ACTIVATIONS, *_NULL_HEADS, *_QWEN_WINDOWS, *_BIAS),
    "gemma2": (
        *_SHAPES,
        *_BIAS,
        Variant("hidden_activation", {"hidden_activation": "silu"}),
        Variant("sliding_window", {"sliding_window": 5}),
        Variant("layer_types", {"layer_types": [FULL, SLIDING]}),
        Variant("layer_types, all full", {"layer_types": [FULL, FULL]}),
        Variant("query_pre_attn_scalar", {"query_pre_attn_scalar": 4}),
        Variant("final_logit_softcapping", {"final_logit_softcapping": 5.0}),
        Variant("final_logit_softcapping, null", {"final_logit_softcapping": None}),
        Variant("attn_logit_softcapping", {"attn_logit_softcapping": 1.0}),
        Variant(
            "attn_logit_softcapping, null", {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 1.0}
        ),
    ),
}

_NOTHING: Config = {
    "transformers_version": "3.0.0",
    "architectures": ["SomethingElse"],
    "output_hidden_states": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 2,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0},
    "problem_type": "regression",
    "initializer_range": 0.5,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": [5, 6],
    "attention_dropout": 0.5,
    "max_position_embeddings": 4096,
    # Not of any config class, and read by none.
    "torchscript": True,
    "pruned_heads": {"0": [1]},
    "attention_multiplier": 3.0,
    "transformers.js_config": {"dtype": "q4"},
    "quantization_config": None,
    "head_size": 3,
    "layer_norm_eps": 0.5,
}
WITHOUT_EFFECT: Mapping[str, Config] = {
    "llama": {**_NOTHING, "pretraining_tp": 2, "layer_types": [FULL, FULL], "sliding_window": 4096},
    "mistral": {**_NOTHING, "attention_bias": True, "use_sliding_window": False},
    "mixtral": {
        **_NOTHING,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
        "router_jitter_noise": 0.5,
    },
    "qwen2": {**_NOTHING, "attention_bias": False, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {**_NOTHING, "mlp_bias": True, "sliding_window": None, "max_window_layers": 0},
    "gemma2": {**_NOTHING, "hidden_act": "relu", "final_logit_softcap": 1.0},
}
# Says in which form Python gets an answer; transformers' own causal models fail where it is false.
OF_PYTHON_ONLY = frozenset({"return_dict"})
# Null, where transformers' types have no null and its code, or an older one, reads it as we do.
LENIENT_NULLS = frozenset({"num_key_value_heads"})
