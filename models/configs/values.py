"""Valid values of each config key, and the messages that refuse all others."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

from p2pinfer.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"

Check = Callable[[Any], bool]


def check_values(model: str, values: Mapping[str, Any]) -> None:
    """Nothing, if each value is one that its key may have.

    Args:
        model: The name for people.
        values: By key; every key is one that p2pinfer reads.

    Raises:
        CheckpointError: One is not; the sentence names the key and the value.
    """
    for key, value in values.items():
        if not ((value is None and key in _NULLABLE) or _CHECKS[key](value)):
            refuse_value(model, key, value)


def refuse_value(model: str, key: str, value: object) -> NoReturn:
    """Raise the `CheckpointError` for a value that makes no sense."""
    raise CheckpointError(f"the config of {model} has the invalid value {key} = {shown(value)}")


def shown(value: object) -> str:
    """A value of anybody's config, cut to what fits into a sentence."""
    return f"{reprlib.repr(value):.80}"


def _whole(most: int, least: int = 1) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _real(most: float, above: float = 0.0) -> Check:
    return lambda value: type(value) in (int, float) and above < value <= most  # NaN is in no range


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_not_negative(value: Any) -> bool:
    return value == 0 or _is_scale(value)


def _are_layer_types(value: Any) -> bool:
    return isinstance(value, list) and all(kind in (SLIDING, FULL) for kind in cast("list[object]", value))


def _are_factors(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_scale, cast("Sequence[object]", value)))


def _are_block_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in cast("list[object]", value))


_MANY = 1e9
_is_scale = _real(_MANY)
_is_length = _whole(1 << 40)
_CHECKS: Mapping[str, Check] = {
    "num_hidden_layers": _whole(10_000),
    "hidden_size": _whole(1 << 20),
    "num_attention_heads": _whole(1 << 16),
    "num_key_value_heads": _whole(1 << 16),
    "head_dim": _whole(1 << 16),
    "intermediate_size": _whole(1 << 24),
    "vocab_size": _whole(1 << 26),
    "max_position_embeddings": _is_length,
    "num_local_experts": _whole(1 << 16),
    "num_experts_per_tok": _whole(1 << 16),
    "sliding_window": _is_length,
    "max_window_layers": _whole(1 << 40, least=0),
    "use_sliding_window": _is_flag,
    "layer_types": _are_layer_types,
    "hidden_act": _is_text,
    "hidden_activation": _is_text,
    "attention_bias": _is_flag,
    "mlp_bias": _is_flag,
    "rms_norm_eps": _real(1.0),
    "layer_norm_eps": _real(1.0),
    "query_pre_attn_scalar": _is_scale,
    "attn_logit_softcapping": _is_scale,
    "final_logit_softcapping": _is_scale,
    "tie_word_embeddings": _is_flag,
    "rope_theta": _real(1e30, above=1.0),
    "factor": _is_scale,
    "low_freq_factor": _is_scale,
    "high_freq_factor": _is_scale,
    "original_max_position_embeddings": _is_length,
    "beta_fast": _is_scale,
    "beta_slow": _is_scale,
    "attention_factor": _is_scale,
    "mscale": _is_not_negative,
    "mscale_all_dim": _is_not_negative,
    "truncate": _is_flag,
    "short_factor": _are_factors,
    "long_factor": _are_factors,
    "partial_rotary_factor": _real(1.0),
    "attention_out_bias": _is_flag,
    "use_qk_norm": _is_flag,
    "alibi": _is_flag,
    "multi_query": _is_flag,
    "new_decoder_architecture": _is_flag,
    "parallel_attn": _is_flag,
    "num_ln_in_parallel_attn": _whole(2),
    "use_parallel_residual": _is_flag,
    "embedding_multiplier": _is_scale,
    "residual_multiplier": _is_scale,
    "attention_multiplier": _is_scale,
    "logits_scaling": _is_scale,
    "logit_scale": _is_scale,
    "moe_intermediate_size": _whole(1 << 24),
    "shared_expert_intermediate_size": _whole(1 << 24),
    "norm_topk_prob": _is_flag,
    "decoder_sparse_step": _whole(1 << 16),
    "mlp_only_layers": _are_block_numbers,
    "no_rope_layers": _are_block_numbers,
    "no_rope_layer_interval": _whole(1 << 16),
    "sliding_window_pattern": _whole(10_000),
    "swiglu_alpha": _is_scale,
    "swiglu_limit": _is_scale,
}
READ = frozenset(_CHECKS)  # every key that some family's forward pass reads
# Where null means none, or to be derived.
_NULLABLE = frozenset(
    {
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "layer_types",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "num_ln_in_parallel_attn",
        "mlp_only_layers",
        "no_rope_layers",
        "sliding_window_pattern",
    }
)
