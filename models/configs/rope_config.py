"""Settings of the rotary embedding, in any spelling, and the context length that they allow.

transformers writes them as one dict, `rope_parameters`. Before, the theta stood beside a dict `rope_scaling`,
whose type was called `type`; both spellings are found in one file, and the original length in either place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from p2pinfer.errors import CheckpointError

from .family_rules import Rules
from .not_computed import check_computed
from .values import FULL, check_values, refuse_value, shown

ORIGINAL = "original_max_position_embeddings"

# By type, what else a config may say; None: there is no default, or null is one.
_TYPES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "dynamic": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        ORIGINAL: None,
    },
    "yarn": {
        "factor": None,
        ORIGINAL: None,
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
    "longrope": {
        "factor": None,
        ORIGINAL: None,
        "attention_factor": None,
        "short_factor": None,
        "long_factor": None,
    },
    "proportional": {"factor": 1.0, "partial_rotary_factor": 1.0},
}
# Those whose max_position_embeddings is, by convention, the length before it was extended.
_EXTENDING = frozenset({"linear", "dynamic", "proportional"})


def rope_parameters(
    model: str,
    config: Mapping[str, Any],
    *,
    theta: Any,
    head_dim: int,
    max_positions: int,
    rules: Rules | None = None,
) -> dict[str, Any]:
    """The rotary embedding's settings in transformers' newest spelling, complete and checked.

    Args:
        model: The name for people.
        config: config.json as it is.
        theta: What stands beside the dict, or the family's default.
        head_dim: Numbers in a head.
        max_positions: The config's max_position_embeddings.
        rules: What the family's rope has beyond Llama's.

    Raises:
        CheckpointError: The type is unknown, or a value makes no sense.
    """
    rules = rules or Rules()
    given: Any = config.get("rope_scaling") or config.get("rope_parameters") or rules.default_rope
    if not isinstance(given, dict):
        refuse_value(model, "rope_parameters", given)
    said = {"rope_theta": theta, **cast("dict[str, Any]", given)}
    if any(isinstance(value, dict) for value in said.values()):
        raise CheckpointError(
            f"{model} has a rotary embedding for each type of block, which p2pinfer does not support"
        )
    rope_type: Any = said.get("rope_type", said.get("type", "default"))
    if rules.restarts_long and rope_type in ("su", "yarn"):
        rope_type = "longrope"  # by its names of old
    types = [each for each in _TYPES if each in rules.rope_types or not rules.rope_types]
    if not isinstance(rope_type, str) or rope_type not in types:
        raise CheckpointError(
            f"{model} has the rope type {shown(rope_type)}, which p2pinfer does not support; "
            f"it supports {', '.join(types)}"
        )
    rope = _read(model, config, said, rope_type, max_positions, rules)
    check_values(model, rope)
    _check_shape(model, rope_type, rope, rotary_size(rope_type, rope, head_dim))
    return {"rope_type": rope_type, **rope}


def ropes_by_kind(
    model: str, config: Mapping[str, Any], *, thetas: Mapping[str, Any], head_dim: int, max_positions: int
) -> dict[str, Any]:
    """The same by kind of attention, of families that rotate each in its own way.

    A `rope_scaling` is that of full attention, as in configs from before there was one for each.
    """
    found: Any = config.get("rope_parameters") or {}
    scaling: Any = config.get("rope_scaling") or {}
    if not isinstance(found, dict) or not isinstance(scaling, dict):
        refuse_value(model, "rope_parameters", found if scaling == {} else scaling)
    said = cast("dict[str, Any]", found)
    if strange := said.keys() - thetas.keys():
        refuse_value(model, "rope_parameters", min(map(str, strange)))
    ropes: dict[str, Any] = {}
    for kind, theta in thetas.items():
        own = said.get(kind) or {}
        if not isinstance(own, dict):
            refuse_value(model, "rope_parameters", own)
        own = {**cast("dict[str, Any]", own), **(scaling if kind == FULL else {})}
        rest = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
        ropes[kind] = rope_parameters(
            model,
            {**rest, "rope_parameters": own},
            theta=theta,
            head_dim=head_dim,
            max_positions=max_positions,
        )
    return ropes


def rotary_size(rope_type: str, rope: Mapping[str, Any], head_dim: int) -> int:
    """Numbers of a head that are rotated, the first ones."""
    if rope_type == "proportional":
        return head_dim  # some of its frequencies are zero
    return int(head_dim * rope.get("partial_rotary_factor", 1))


def context_length(rope: Mapping[str, Any], max_positions: int) -> int:
    """Number of tokens that a text may have, with the scaling of the model's own context.

    Of llama3 and longrope the config says that length itself; of linear and dynamic it says the length
    before, as transformers' documentation asked for. Configs with yarn do either: the longer one counts.

    Args:
        rope: As `rope_parameters` returns it.
        max_positions: The config's max_position_embeddings.
    """
    if "rope_type" not in rope:
        return context_length(rope[FULL], max_positions)
    if rope["rope_type"] in _EXTENDING:
        return max(max_positions, int(max_positions * rope["factor"]))
    if rope["rope_type"] == "yarn":
        return max(max_positions, int(rope[ORIGINAL] * rope["factor"]))
    return max_positions


def prompt_limit(rope: Mapping[str, Any]) -> int | None:
    """The longest prompt whose tokens are turned by their position alone, None if all are.

    The angles of dynamic and longrope depend on how long the text is. transformers turns a prompt by the
    length of the whole prompt, each later token by its own position, and turns nothing again that it has
    cached. Up to the model's own length these agree, so a hop that sees a text in pieces turns it in the same
    way. Of a longer prompt the first tokens would have to know where it ends.

    Args:
        rope: As `rope_parameters` returns it.
    """
    if "rope_type" not in rope:
        limits = [limit for each in rope.values() if (limit := prompt_limit(each)) is not None]
        return min(limits, default=None)
    return rope[ORIGINAL] if rope["rope_type"] in ("dynamic", "longrope") else None


def _read(
    model: str,
    config: Mapping[str, Any],
    said: Mapping[str, Any],
    rope_type: str,
    max_positions: int,
    rules: Rules,
) -> dict[str, Any]:
    """Values of the type's keys, as transformers takes what is null, absent or said twice."""
    types = _TYPES[rope_type]
    rope = {"rope_theta": said["rope_theta"], **{key: said.get(key, usual) for key, usual in types.items()}}
    if rope_type == "proportional" and "partial_rotary_factor" not in said:
        rope["partial_rotary_factor"] = config.get("partial_rotary_factor") or 1.0
    elif rope_type != "proportional" and rules.partial_rotary is not None:
        beside = config.get("partial_rotary_factor", rules.partial_rotary)
        rope["partial_rotary_factor"] = said.get("partial_rotary_factor", beside)
    elif rope_type != "proportional":
        check_computed(model, "partial_rotary_factor", said)
        check_computed(model, "partial_rotary_factor", config)
    if ORIGINAL in types:
        # The key beside the dict wins over the one in it.
        beside = config.get(ORIGINAL, rules.original_positions or rope[ORIGINAL])
        rope[ORIGINAL] = max_positions if beside is None else beside
    elif rope_type == "dynamic":
        rope[ORIGINAL] = max_positions  # whatever else is said
    if rope_type == "yarn":
        rope["beta_fast"] = rope["beta_fast"] or types["beta_fast"]
        rope["beta_slow"] = rope["beta_slow"] or types["beta_slow"]
        rope["truncate"] = False if rope["truncate"] is None else rope["truncate"]
    # Of yarn the key may be null, and not left out.
    if rope_type == "longrope" or (rope_type == "yarn" and "factor" in said):
        check_values(model, {ORIGINAL: rope[ORIGINAL]})
        rope["factor"] = rope["factor"] or max_positions / rope[ORIGINAL]
    return rope


def _check_shape(model: str, rope_type: str, rope: Mapping[str, Any], rotary: int) -> None:
    if rope.get("low_freq_factor", 0) >= rope.get("high_freq_factor", 1):
        refuse_value(model, "low_freq_factor", rope["low_freq_factor"])
    for key in ("short_factor", "long_factor"):
        if key in rope and len(rope[key]) != rotary // 2:
            refuse_value(model, key, rope[key])
    if rope_type == "dynamic" and rotary == 2:
        refuse_value(model, "head_dim", rotary)  # the exponent would be 2 / 0
    if "partial_rotary_factor" in rope and (rotary < 2 or rotary % 2):
        refuse_value(model, "partial_rotary_factor", rope["partial_rotary_factor"])
