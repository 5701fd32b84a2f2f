"""Completion of a config.json: family defaults are filled in, unsupported settings are refused.

A checkpoint may leave out whatever equals its family's defaults, and those are part of transformers' code.
Here they are a table, because asking transformers costs every process that computes 2 s and 110 MB; the
tests hold the table to transformers' own classes.

A complete config is spelled as the newest transformers writes it, whichever spelling came in, and has the
keys that the family's model reads and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from p2pinfer.errors import CheckpointError

from .not_computed import check_all_computed, refusal
from .rope_config import context_length, rope_parameters
from .values import FULL, SLIDING, check_values, refuse_value, shown

_EVERY_FAMILY: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as there are heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_QWEN: Mapping[str, Any] = {
    "vocab_size": 151_936,
    "hidden_act": "silu",
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_act": "silu",
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_act": "silu",
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "layer_types": None,
    },
    "mixtral": {
        "vocab_size": 32_000,
        "hidden_act": "silu",
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
    "gemma2": {
        "hidden_size": 2304,
        "vocab_size": 256_000,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
}
FAMILIES = frozenset(_FAMILIES)
# What transformers calls a mistral whose config lists its layer_types; a mistral may list them here.
_ALIASES: Mapping[str, str] = {"ministral": "mistral"}

# transformers' names for activations that are a function of a number alone (activations.py computes them).
ACTIVATIONS = frozenset(
    [
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
    ]
)

# The kinds of attention of one block after the other, over and over; sliding in each unless said here.
_LAYER_TYPES: Mapping[str, tuple[str, ...]] = {"gemma2": (SLIDING, FULL)}


def complete_config(model: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """All that the forward pass and the spec ask of a config, every value checked.

    Args:
        model: The name for people.
        config: config.json as it is.

    Raises:
        CheckpointError: The family is unknown, the weights are quantised, or a value makes no sense.
    """
    family = _family(model, config)
    check_all_computed(model, config)
    defaults = {**_EVERY_FAMILY, **_FAMILIES[family]}
    complete = {key: config.get(key, default) for key, default in defaults.items()}
    if family == "mixtral" and "num_experts" in config:
        complete["num_local_experts"] = config["num_experts"]  # an alias, which wins
    if "layer_types" in complete:
        complete["layer_types"] = _renamed(complete["layer_types"])
    check_values(model, complete)
    _derive_heads(model, complete, defaults)
    if not complete.pop("use_sliding_window", True):
        complete["sliding_window"] = None
    complete["layer_types"] = _layer_types(family, complete)
    complete["rope_parameters"] = rope_parameters(
        model,
        config,
        theta=complete.pop("rope_theta"),
        head_dim=complete["head_dim"],
        max_positions=complete["max_position_embeddings"],
    )
    _check_together(model, complete)
    _check_unread(model, config, complete)
    return {"model_type": family, **complete}


def max_positions(complete: Mapping[str, Any]) -> int:
    """Number of tokens that a text may have, by a complete config."""
    return context_length(complete["rope_parameters"], complete["max_position_embeddings"])


def _family(model: str, config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES.keys() | _ALIASES:
        raise CheckpointError(
            f"{model} has the model type {shown(family)}, which p2pinfer does not support; "
            f"it supports {', '.join(sorted(_FAMILIES))}"
        )
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"the weights of {model} are quantised; use a float32, float16 or bfloat16 checkpoint"
        )
    return _ALIASES.get(family, family)


def _derive_heads(model: str, complete: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    heads = complete["num_attention_heads"]
    if complete["num_key_value_heads"] is None:
        complete["num_key_value_heads"] = heads
    if complete["head_dim"] is None:
        if defaults["head_dim"] is not None:
            refuse_value(model, "head_dim", None)
        complete["head_dim"] = complete["hidden_size"] // heads


def _layer_types(family: str, complete: dict[str, Any]) -> tuple[str, ...]:
    """The kind of attention of each block."""
    first = complete.pop("max_window_layers", 0)
    said: list[str] | None = complete.get("layer_types")
    if said is not None:
        return tuple(said)
    blocks: int = complete["num_hidden_layers"]
    if complete.get("sliding_window") is None and family != "gemma2":
        return (FULL,) * blocks
    pattern = _LAYER_TYPES.get(family, (SLIDING,))
    return tuple(pattern[index % len(pattern)] if index >= first else FULL for index in range(blocks))


def _check_together(model: str, complete: Mapping[str, Any]) -> None:
    fits: Iterable[tuple[str, bool]] = (
        ("head_dim", complete["head_dim"] > 0 and complete["head_dim"] % 2 == 0),
        ("num_key_value_heads", complete["num_attention_heads"] % complete["num_key_value_heads"] == 0),
        ("layer_types", len(complete["layer_types"]) == complete["num_hidden_layers"]),
        (
            "num_experts_per_tok",
            complete.get("num_experts_per_tok", 0) <= complete.get("num_local_experts", 0),
        ),
    )
    for key, fit in fits:
        if not fit:
            refuse_value(model, key, complete[key])
    if SLIDING in complete["layer_types"] and complete.get("sliding_window") is None:
        raise CheckpointError(f"{model} has sliding-window blocks, but its config sets no sliding_window")
    activation = complete.get("hidden_activation") or complete["hidden_act"]
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{model} has the activation {shown(activation)}, which p2pinfer does not support: "
            f"it has weights of its own, or transformers does not know it"
        )


def _check_unread(model: str, config: Mapping[str, Any], complete: Mapping[str, Any]) -> None:
    """Refuse keys that the family does not read, and by which transformers cuts its caches all the same."""
    said, kinds = _renamed(config.get("layer_types")), list(complete["layer_types"])
    if said not in (None, [FULL] * len(kinds), kinds):
        raise refusal(model, "layer_types", "transformers would cut some caches, and not what is seen, by it")
    window: Any = config.get("sliding_window")
    if window is None or "sliding_window" in complete:
        return
    if type(window) is not int or window < max_positions(complete):
        raise refusal(model, "sliding_window", "transformers would cut the cache, and not the prompt, by it")


def _renamed(layer_types: Any) -> Any:
    """Layer types with full attention called by its name of today."""
    if not isinstance(layer_types, list):
        return layer_types
    return [FULL if kind == "attention" else kind for kind in cast("list[object]", layer_types)]
