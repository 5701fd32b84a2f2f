"""Tiny configs of every family, with the options that set each apart switched on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Config: TypeAlias = Mapping[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"
BLOCKS = 4
_LONG = {"short_factor": [1.0, 1.5] * 3, "long_factor": [2.0, 8.0] * 3}
_COMMON: Config = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,  # tied ones make a model that repeats itself
}
_SMALL: Config = {key: value for key, value in _COMMON.items() if "head" not in key or "attention" in key}
_EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2}
_MIXED: Config = {"sliding_window": 12, "layer_types": [SLIDING, FULL, SLIDING, SLIDING]}
_LINEAR: Config = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}


@dataclass(frozen=True)
class Sample:
    """A family's config, and changes of it that change the logits.

    Attributes:
        weighty: Attention implementation of transformers that is right; its eager one has a fault of its own
            where it is another.
        silent: Changes that do not.
    """

    config: Config
    variants: Mapping[str, Config] = field(default_factory=dict[str, Any])
    silent: Mapping[str, Config] = field(default_factory=dict[str, Any])


SAMPLES: Mapping[str, Sample] = {
    "llama": Sample({**_COMMON, "mlp_bias": True}, {"tied": {"tie_word_embeddings": True}}),
    "mistral": Sample({**_COMMON, "head_dim": 20, "sliding_window": 12}),
    "mixtral": Sample({**_COMMON, "num_local_experts": 4}),
    "qwen2": Sample({**_COMMON, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": Sample({**_COMMON, "head_dim": 16}, {"attention_bias": {"attention_bias": True}}),
    "gemma": Sample(
        {**_COMMON, "head_dim": 16}, {"hidden_act": {"hidden_act": "silu"}}, {"gelu": {"hidden_act": "gelu"}}
    ),
    "gemma2": Sample({**_COMMON, "head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 24}),
    "gemma3_text": Sample(
        {**_COMMON, **_MIXED, "head_dim": 16, "query_pre_attn_scalar": 24},
        {
            "sliding_window_pattern": {"layer_types": None, "sliding_window_pattern": 2},
            "rope_scaling": _LINEAR,
            "thetas of old": {"rope_theta": 500.0, "rope_local_base_freq": 50.0},
            "thetas by kind": {
                "rope_parameters": {
                    FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
                    SLIDING: {"rope_type": "default", "rope_theta": 50.0},
                }
            },
            "final_logit_softcapping": {"final_logit_softcapping": 5.0},
            "query_pre_attn_scalar": {"query_pre_attn_scalar": 4},
            "attention_bias": {"attention_bias": True},
        },
        {"attn_logit_softcapping": {"attn_logit_softcapping": 1.0}},
    ),
    "phi3": Sample(
        {**_COMMON, "pad_token_id": 0},
        {
            "partial_rotary_factor": {"partial_rotary_factor": 0.5},
            "sliding_window": {"sliding_window": 12},
            "longrope": {
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 128,
                "rope_scaling": {"type": "longrope", **_LONG},
            },
        },
    ),
    "phi": Sample(
        _COMMON,
        {"qk_layernorm": {"qk_layernorm": True}, "partial_rotary_factor": {"partial_rotary_factor": 0.25}},
    ),
    "olmo2": Sample(_COMMON, {"attention_bias": {"attention_bias": True}, "rope_scaling": _LINEAR}),
    "olmo3": Sample({**_COMMON, **_MIXED}, {"pattern": {"layer_types": None}, "rope_scaling": _LINEAR}),
    "olmoe": Sample({**_COMMON, **_EXPERTS}, {"norm_topk_prob": {"norm_topk_prob": True}}),
    "granite": Sample(
        {
            **_COMMON,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "embedding_multiplier": 6.0,
            "logits_scaling": 4.0,
        },
        {
            "attention_multiplier": {"attention_multiplier": 0.5},
            "residual_multiplier": {"residual_multiplier": 0.3},
            "embedding_multiplier": {"embedding_multiplier": 2.0},
            "logits_scaling": {"logits_scaling": 8.0},
            "biases": {"attention_bias": True, "mlp_bias": True},
        },
    ),
    "qwen2_moe": Sample(
        {**_COMMON, **_EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
        {
            "norm_topk_prob": {"norm_topk_prob": True},
            "mlp_only_layers": {"mlp_only_layers": [1, 2]},
            "decoder_sparse_step": {"decoder_sparse_step": 2},
            "qkv_bias": {"qkv_bias": False},
            "sliding_window": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 3},
        },
    ),
    "qwen3_moe": Sample(
        {**_COMMON, **_EXPERTS, "moe_intermediate_size": 24},
        {
            "norm_topk_prob": {"norm_topk_prob": True},
            "mlp_only_layers": {"mlp_only_layers": [0]},
            "head_dim": {"head_dim": 24},
            "sliding_window": {"use_sliding_window": True, "sliding_window": 12},
        },
    ),
    "glm": Sample(
        {**_COMMON, "head_dim": 16, "pad_token_id": 0},
        {"partial_rotary_factor": {"partial_rotary_factor": 1.0}},
    ),
    "glm4": Sample(
        {**_COMMON, "head_dim": 16, "pad_token_id": 0},
        {
            "partial_rotary_factor": {"partial_rotary_factor": 0.25},
            "attention_bias": {"attention_bias": False},
        },
    ),
    "starcoder2": Sample(
        {**_COMMON, "sliding_window": 12},
        {"use_bias": {"use_bias": False}, "window": {"sliding_window": None}},
    ),
    "cohere": Sample(
        {**_COMMON, "logit_scale": 0.5},
        {"use_qk_norm": {"use_qk_norm": True}, "attention_bias": {"attention_bias": True}},
    ),
    "cohere2": Sample(
        {**_COMMON, **_MIXED, "logit_scale": 0.5},
        {"sliding_window_pattern": {"layer_types": None, "sliding_window_pattern": 3}},
    ),
    "falcon": Sample(
        {**_SMALL, "ffn_hidden_size": 96},
        {
            "40B": {"new_decoder_architecture": True, "num_kv_heads": 2},
            "11B": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            "RW": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
            "ffn_hidden_size": {"ffn_hidden_size": None},
            "activation": {"activation": "relu"},
        },
    ),
    "bloom": Sample(
        {
            "vocab_size": 97,
            "hidden_size": 60,
            "n_layer": BLOCKS,
            "n_head": 6,  # no power of two
            "seq_length": 256,
            "tie_word_embeddings": False,
        },
        {"eps": {"layer_norm_epsilon": 0.5}},
        {"slow": {"slow_but_exact": True}},
    ),
    "gpt_neox": Sample(
        {**_SMALL, "rotary_pct": 0.5},
        {
            "use_parallel_residual": {"use_parallel_residual": False},
            "attention_bias": {"attention_bias": False},
            "rotary_emb_base": {"rotary_emb_base": 50.0},
        },
    ),
    "stablelm": Sample(
        {**_COMMON, "partial_rotary_factor": 0.5},
        {"use_parallel_residual": {"use_parallel_residual": True}, "use_qkv_bias": {"use_qkv_bias": True}},
    ),
    "arcee": Sample({**_COMMON, "head_dim": 16}, {"biases": {"attention_bias": True, "mlp_bias": True}}),
    "seed_oss": Sample(
        {**_COMMON, "head_dim": 16},
        {"attention_out_bias": {"attention_out_bias": True}, "attention_bias": {"attention_bias": False}},
    ),
    "smollm3": Sample(
        {**_COMMON, "no_rope_layer_interval": 2, "pad_token_id": 0},
        {
            "no_rope_layers": {"no_rope_layers": [1, 1, 0, 1]},
            "sliding_window": {"use_sliding_window": True, "sliding_window": 12},
        },
    ),
    "gpt_oss": Sample(
        {**_COMMON, "head_dim": 16, "sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
        {
            "swiglu": {"swiglu_alpha": 1.0, "swiglu_limit": 0.5},
            "layer_types": {"layer_types": [FULL, SLIDING, FULL, FULL]},
            "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        },
    ),
}
