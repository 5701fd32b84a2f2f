"""Completion of a config.json: family defaults are filled in, unsupported settings are refused.

A checkpoint may leave out whatever equals its family's defaults, and those are part of transformers' code.
Here they are a table (family_defaults.json), because asking transformers costs every process that computes
2 s and 110 MB; the tests hold the table to transformers' own classes.

A complete config is spelled as the newest transformers writes it, whichever spelling came in, and has the
keys that the family's model reads and no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from p2pinfer.errors import CheckpointError

from .family_rules import DEFAULTS, FAMILIES, RULES, Rules
from .not_computed import check_all_computed, refusal
from .quantization import KEY, parse_quantization
from .refused_families import REASONS
from .rope_config import ORIGINAL, context_length, rope_parameters, ropes_by_kind
from .values import FULL, SLIDING, check_values, refuse_value, shown

# What transformers calls a mistral whose config lists its layer_types; a mistral may list them here.
_ALIASES: Mapping[str, str] = {"ministral": "mistral"}
_NULL_IS_ABSENT = frozenset({"n_embed"})

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


def complete_config(model: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """All that the forward pass and the spec ask of a config, every value checked.

    Args:
        model: The name for people.
        config: config.json as it is.

    Raises:
        CheckpointError: The family is unknown, the weights are quantised, or a value makes no sense.
    """
    family = _family(model, config)
    rules, defaults = RULES[family], DEFAULTS[family]
    check_all_computed(model, config, rules.refused)
    said = {**_renamed_keys(config, rules), **rules.fixed}
    complete = {key: said.get(key, default) for key, default in defaults.items()}
    if "layer_types" in complete:
        complete["layer_types"] = _renamed(complete["layer_types"])
    if complete.get("use_sliding_window") is False:
        complete["sliding_window"] = None  # saved as null or 0
    given = {key: value for key, value in complete.items() if key not in rules.fixed}
    # What is null in the class itself is derived below.
    said_of = {key: value for key, value in given.items() if value is not None or defaults[key] is not None}
    check_values(model, said_of)
    activation = complete.get("hidden_act")
    complete |= {"hidden_act": rules.activations.get(activation, activation)} if activation else {}
    _derive_heads(model, complete, defaults)
    if family == "falcon":
        _derive_falcon(complete)
    elif complete["intermediate_size"] is None:
        complete["intermediate_size"] = 4 * complete["hidden_size"]
    complete.pop("use_sliding_window", None)
    if "mlp_only_layers" in complete:
        complete["mlp_only_layers"] = complete["mlp_only_layers"] or []
    _derive_unrotated(complete)
    complete["layer_types"] = _layer_types(rules, complete)
    complete["rope_parameters"] = _ropes(model, config, rules, complete)
    _check_together(model, complete)
    _check_unread(model, config, complete)
    published = parse_quantization(model, config)
    stored = {} if published is None else {KEY: str(published)}
    return {"model_type": family, **complete, **stored}


def max_positions(complete: Mapping[str, Any]) -> int:
    """Number of tokens that a text may have, by a complete config."""
    return context_length(complete["rope_parameters"], complete["max_position_embeddings"])


def _renamed_keys(config: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """The config with its own names of keys replaced by ours; its own counts where both are there."""
    said = dict(config)
    for name, ours in rules.names.items():
        if name in config and not (name in _NULL_IS_ABSENT and config[name] is None):
            said[ours] = config[name]
    return said


def _family(model: str, config: Mapping[str, Any]) -> str:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES | _ALIASES.keys():
        known = f"docs/models.md lists the {len(FAMILIES)} that it does"
        raise CheckpointError(
            f"{model} has the model type {shown(family)}, which p2pinfer does not support: "
            f"{REASONS.get(family, known) if isinstance(family, str) else known}"
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


def _derive_falcon(complete: dict[str, Any]) -> None:
    """Key heads, feed-forward size and norms, which depend on the generation of Falcon."""
    complete["intermediate_size"] = complete["intermediate_size"] or 4 * complete["hidden_size"]
    if not complete["new_decoder_architecture"]:
        complete["num_key_value_heads"] = 1 if complete["multi_query"] else complete["num_attention_heads"]
    norms = complete["num_ln_in_parallel_attn"]
    if norms is None and complete["new_decoder_architecture"]:
        complete["num_ln_in_parallel_attn"] = 2


def _derive_unrotated(complete: dict[str, Any]) -> None:
    """A 0 or 1 for each block: whether its queries and keys are rotated."""
    interval = complete.pop("no_rope_layer_interval", None)
    if interval is not None and complete["no_rope_layers"] is None:
        blocks = range(1, complete["num_hidden_layers"] + 1)
        complete["no_rope_layers"] = [int(block % interval != 0) for block in blocks]


def _layer_types(rules: Rules, complete: dict[str, Any]) -> tuple[str, ...]:
    """The kind of attention of each block."""
    turn: int = complete.pop("max_window_layers", 0)
    period: int | None = complete.pop(rules.period_key, None)
    said: list[str] | None = complete.get("layer_types")
    if said is not None:
        return tuple(said)
    blocks: int = complete["num_hidden_layers"]
    if complete.get("sliding_window") is None and not rules.needs_window:
        return (FULL,) * blocks
    if (rotated := complete.get("no_rope_layers")) is not None:
        return tuple(FULL if each else SLIDING for each in rotated)
    pattern = rules.layers if period is None else (*[SLIDING] * (period - 1), FULL)
    sliding = range(turn) if rules.slides_first else range(turn, blocks)
    return tuple(pattern[index % len(pattern)] if index in sliding else FULL for index in range(blocks))


def _ropes(model: str, config: Mapping[str, Any], rules: Rules, complete: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embedding, by kind of attention where each has its own."""
    theta = complete.pop("rope_theta", None)
    if rules.rope == "none" or complete.get("alibi"):
        return {"rope_type": "none"}
    sizes = {"head_dim": complete["head_dim"], "max_positions": complete["max_position_embeddings"]}
    if rules.rope == "by kind":
        thetas = {FULL: theta, SLIDING: config.get("rope_local_base_freq", rules.local_theta)}
        return ropes_by_kind(model, config, thetas=thetas, **sizes)
    rope = rope_parameters(model, _renamed_keys(config, rules), theta=theta, rules=rules, **sizes)
    if rules.restarts_long and rope["rope_type"] == "longrope":
        complete["max_position_embeddings"] = min(sizes["max_positions"], rope[ORIGINAL])
    return rope


def _check_together(model: str, complete: Mapping[str, Any]) -> None:
    kinds = complete["layer_types"]
    fits: Iterable[tuple[str, bool]] = (
        ("head_dim", complete["head_dim"] > 0 and complete["head_dim"] % 2 == 0),
        ("num_key_value_heads", complete["num_attention_heads"] % complete["num_key_value_heads"] == 0),
        ("layer_types", len(kinds) == complete["num_hidden_layers"]),
        (
            "num_experts_per_tok",
            complete.get("num_experts_per_tok", 0) <= complete.get("num_local_experts", 0),
        ),
        ("no_rope_layers", len(complete.get("no_rope_layers") or kinds) == len(kinds)),
    )
    for key, fit in fits:
        if not fit:
            refuse_value(model, key, complete[key])
    if SLIDING in kinds and complete.get("sliding_window") is None:
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
