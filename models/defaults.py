"""A config.json made complete: what its family takes for granted is filled in, what no model has is refused.

A checkpoint may leave out whatever equals its family's defaults, and those are part of transformers' code.
Here they are a table, because asking transformers costs every process that computes 2 s and 110 MB; the
tests hold the table to transformers' own classes.

A complete config is spelled as the newest transformers writes it, whichever spelling came in, and has the
keys that the family's model reads and no others: a sliding_window means nothing to a llama.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, cast

from p2pinfer.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"

_EVERY_FAMILY: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as there are heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_QWEN: Mapping[str, Any] = {
    "vocab_size": 151_936,
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
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mistral": {
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "mixtral": {
        "vocab_size": 32_000,
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

# The kinds of attention of one block after the other, over and over; sliding in each unless said here.
_LAYER_TYPES: Mapping[str, tuple[str, ...]] = {"gemma2": (SLIDING, FULL)}

# By rope type, what else a config has to say; None: there is no default. These are the types whose
# frequencies do not depend on how long the sequence is: only those can be packed with other sequences, and
# rolled back.
_ORIGINAL_POSITIONS = "original_max_position_embeddings"
_ROPE_TYPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        _ORIGINAL_POSITIONS: None,
    },
    "yarn": {
        "factor": None,
        _ORIGINAL_POSITIONS: None,
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}

# What would change the forward pass in ways that nothing here computes, and the values that do not.
_NOT_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1),
    "per_layer_config": (None, {}),
    "use_bidirectional_attention": (None, False),
}


def complete_config(model: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """All that the forward pass and the spec ask of a config, every value checked.

    Args:
        model: The name for people.
        config: config.json as it is.

    Raises:
        CheckpointError: The family is unknown, the weights are quantised, or a value makes no sense.
    """
    family = _family(model, config)
    defaults = {**_EVERY_FAMILY, **_FAMILIES[family]}
    complete = {key: config.get(key, default) for key, default in defaults.items()}
    _check(model, complete)
    heads = complete["num_attention_heads"]
    if complete["num_key_value_heads"] is None:
        complete["num_key_value_heads"] = heads
    if complete["head_dim"] is None:
        complete["head_dim"] = complete["hidden_size"] // heads
    if not complete.pop("use_sliding_window", True):
        complete["sliding_window"] = None
    complete["layer_types"] = _layer_types(family, complete)
    complete["rope_parameters"] = _rope_parameters(model, config, complete)
    _check_together(model, complete)
    return {"model_type": family, **complete}


def _family(model: str, config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise CheckpointError(
            f"{model} is of family {_shown(family)}, which p2pinfer does not run; "
            f"it runs {', '.join(sorted(_FAMILIES))}"
        )
    if "quantization_config" in config:
        raise CheckpointError(
            f"the weights of {model} are quantised; use a float32, float16 or bfloat16 checkpoint"
        )
    _check_computed(model, config)
    return family


def _layer_types(family: str, complete: dict[str, Any]) -> tuple[str, ...]:
    """The kind of attention of each block."""
    first = complete.pop("max_window_layers", 0)
    said: list[str] | None = complete.get("layer_types")
    if said is not None:
        return tuple(said)
    blocks: int = complete["num_hidden_layers"]
    if complete.get("sliding_window") is None:
        return (FULL,) * blocks
    pattern = _LAYER_TYPES.get(family, (SLIDING,))
    return tuple(pattern[index % len(pattern)] if index >= first else FULL for index in range(blocks))


def _rope_parameters(model: str, config: Mapping[str, Any], complete: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings in one place; they were once spread over several keys."""
    given: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        _refuse(model, "rope_parameters", given)
    said = cast("dict[str, Any]", given)
    _check_computed(model, said)
    if any(isinstance(value, dict) for value in said.values()):
        raise CheckpointError(
            f"{model} has a rotary embedding per kind of block, which p2pinfer does not compute"
        )
    rope_type: Any = said.get("rope_type", said.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_TYPES:
        raise CheckpointError(
            f"the rope type of {model} is {_shown(rope_type)}, not one of {', '.join(_ROPE_TYPES)}"
        )
    defaults = {"rope_theta": complete.pop("rope_theta"), **_ROPE_TYPES[rope_type]}
    rope = {key: default if said.get(key) is None else said[key] for key, default in defaults.items()}
    if _ORIGINAL_POSITIONS in rope:
        # transformers lets the key beside the dict win over the one in it.
        beside = config.get(_ORIGINAL_POSITIONS, rope[_ORIGINAL_POSITIONS])
        rope[_ORIGINAL_POSITIONS] = complete["max_position_embeddings"] if beside is None else beside
    _check(model, rope)
    return {"rope_type": rope_type, **rope}


Check = Callable[[Any], bool]


def _whole(most: int, least: int = 1) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _real(most: float, above: float = 0.0) -> Check:
    return lambda value: type(value) in (int, float) and above < value <= most  # NaN is in no range


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_text(value: Any) -> bool:
    return type(value) is str


def _are_layer_types(value: Any) -> bool:
    return isinstance(value, list) and all(kind in (SLIDING, FULL) for kind in cast("list[object]", value))


_MANY = 1e9
_CHECKS: Mapping[str, Check] = {
    "num_hidden_layers": _whole(10_000),
    "hidden_size": _whole(1 << 20),
    "num_attention_heads": _whole(1 << 16),
    "num_key_value_heads": _whole(1 << 16),
    "head_dim": _whole(1 << 16),
    "intermediate_size": _whole(1 << 24),
    "vocab_size": _whole(1 << 26),
    "max_position_embeddings": _whole(1 << 40),
    "num_local_experts": _whole(1 << 16),
    "num_experts_per_tok": _whole(1 << 16),
    "sliding_window": _whole(1 << 40),
    "max_window_layers": _whole(1 << 40, least=0),
    "use_sliding_window": _is_flag,
    "layer_types": _are_layer_types,
    "hidden_act": _is_text,
    "hidden_activation": _is_text,
    "rms_norm_eps": _real(1.0),
    "query_pre_attn_scalar": _real(_MANY),
    "attn_logit_softcapping": _real(_MANY),
    "final_logit_softcapping": _real(_MANY),
    "tie_word_embeddings": _is_flag,
    "attention_bias": _is_flag,
    "mlp_bias": _is_flag,
    "rope_theta": _real(1e30, above=1.0),
    "factor": _real(_MANY),
    "low_freq_factor": _real(_MANY),
    "high_freq_factor": _real(_MANY),
    _ORIGINAL_POSITIONS: _whole(1 << 40),
    "beta_fast": _real(_MANY),
    "beta_slow": _real(_MANY),
    "attention_factor": _real(_MANY),
    "mscale": _real(_MANY),
    "mscale_all_dim": _real(_MANY),
    "truncate": _is_flag,
}
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
    }
)


def _check(model: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not ((value is None and key in _NULLABLE) or _CHECKS[key](value)):
            _refuse(model, key, value)


def _check_together(model: str, complete: Mapping[str, Any]) -> None:
    rope = complete["rope_parameters"]
    fits: Iterable[tuple[str, bool]] = (
        ("head_dim", complete["head_dim"] > 0 and complete["head_dim"] % 2 == 0),
        ("num_key_value_heads", complete["num_attention_heads"] % complete["num_key_value_heads"] == 0),
        ("layer_types", len(complete["layer_types"]) == complete["num_hidden_layers"]),
        (
            "num_experts_per_tok",
            complete.get("num_experts_per_tok", 0) <= complete.get("num_local_experts", 0),
        ),
        ("rope_parameters", rope.get("low_freq_factor", 0) < rope.get("high_freq_factor", 1)),
    )
    for key, fit in fits:
        if not fit:
            _refuse(model, key, complete[key])


def _check_computed(model: str, values: Mapping[str, Any]) -> None:
    for key, harmless in _NOT_COMPUTED.items():
        if values.get(key) not in harmless:
            raise CheckpointError(f"{model} sets {key}, which p2pinfer does not compute")


def _refuse(model: str, key: str, value: object) -> NoReturn:
    raise CheckpointError(f"the config of {model} says {key} = {_shown(value)}, which no model has")


def _shown(value: object) -> str:
    return f"{reprlib.repr(value):.80}"
