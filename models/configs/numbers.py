"""Canonical form of the config fields that change the forward pass; part of the revision.

A config.json says the same thing in many ways. Tools add keys that no forward pass reads, transformers of
another version moves a key or fills in a default, and a number is written 10000 or 10000.0. None of that
makes another model. So what is hashed is not the file: it is what `complete_config` makes of it, which holds
the keys that the family's model reads and no others, less what equals the family's defaults. A key that
p2pinfer learns to read is therefore part of a revision by itself, and old revisions stay what they are where
it has its default.

Not part of it: the dtype, since every hop computes in the dtype it announces; the context's length, which
bounds a text and changes no token of it (where it does, the rope's original length says so); whether the head
is tied to the embedding, since the head that the files hold is used, and files without one are run by nobody
unless it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

from blake3 import blake3

from .defaults import complete_config
from .family_rules import FAMILIES
from .values import FULL, SLIDING

Value: TypeAlias = "str | int | float | bool | None"

MAX_NUMBERS: Final = 2048  # characters; a config that is longer is hashed, but not announced
_MAX_LIST: Final = 64  # characters of a list that is spelled out
_MAX_SHOWN: Final = 40  # characters of one value
_KEY: Final = re.compile(r"[a-z0-9_.]{1,64}")

_NO_NUMBERS: Final = frozenset({"max_position_embeddings", "tie_word_embeddings"})
# Names for one function, as activations.py computes them.
_SAME_ACTIVATION: Final[Mapping[str, str]] = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}


def numbers_of(config: Mapping[str, Any]) -> str:
    """Canonical line of JSON with the config fields that change the forward pass.

    Args:
        config: config.json as it is.

    Raises:
        CheckpointError: The config cannot be used.
    """
    fields = _fields(complete_config("the model", config))
    usual = _usual(config["model_type"])
    said = {key: fields.get(key) for key in fields.keys() | usual if fields.get(key) != usual.get(key)}
    said["model_type"] = fields["model_type"]
    return json.dumps(said, sort_keys=True, separators=(",", ":"))


def weights_digest(shard_sha256: Mapping[str, str]) -> str:
    """The content address of weights: 32 hex digits of blake3 over the names and hashes of their shards."""
    lines = [f"{name} {sha256}" for name, sha256 in sorted(shard_sha256.items())]
    return blake3("\n".join(lines).encode()).hexdigest()[:32]


def revision_digest(weights: str, numbers: str) -> str:
    """The content address of a model: 32 hex digits of blake3 over its weights' address and its numbers."""
    return blake3(f"{weights}\n{numbers}".encode()).hexdigest()[:32]


def differences(ours: str, theirs: str) -> str:
    """The fields in which two models of the same weights differ, for people, at most four of them.

    Args:
        theirs: What a peer said; where it is not a line of numbers the answer is empty.
    """
    mine, other = _parse(ours), _parse(theirs)
    if mine is None or other is None:
        return ""
    usual = _usual(str(mine["model_type"])) if mine["model_type"] == other["model_type"] else {}
    mine, other = {**usual, **mine}, {**usual, **other}
    changed = sorted(key for key in mine.keys() | other if mine.get(key) != other.get(key))
    return "; ".join(
        f"{key} is {_shown(mine.get(key))} here and {_shown(other.get(key))} there" for key in changed[:4]
    )


def _usual(family: str) -> dict[str, Value]:
    return _fields(complete_config("the model", {"model_type": family}))


def _fields(complete: Mapping[str, Any]) -> dict[str, Value]:
    """The complete config, flat, each value in the form in which two equal ones are equal as JSON."""
    flat: dict[str, Value] = {}
    for key, value in _walk(_without_dead_keys(complete)):
        flat[key] = _plain(value)
    return flat


def _plain(value: Any) -> Value:
    """A number without a fraction where it has none, a list as text, one that is long as its hash."""
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 10000.0 and 10000 are one number to every reader but JSON's
    if isinstance(value, list | tuple):
        text = json.dumps([_plain(each) for each in cast("Sequence[Any]", value)], separators=(",", ":"))
        return text if len(text) <= _MAX_LIST else f"list {blake3(text.encode()).hexdigest()[:16]}"
    return cast("Value", value)


def _without_dead_keys(complete: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the rest of the config makes meaningless."""
    kept = {key: value for key, value in complete.items() if key not in _NO_NUMBERS}
    activation: str = kept.pop("hidden_activation", None) or kept["hidden_act"]
    kept["hidden_act"] = _SAME_ACTIVATION.get(activation, activation)
    types: Sequence[str] = kept.pop("layer_types", ())
    slides = kept.get("sliding_window") is not None and SLIDING in types
    if "sliding_window" in kept and not slides:
        kept["sliding_window"] = None
    kept["layer_types"] = _pattern(types) if slides else FULL
    return kept


def _pattern(types: Sequence[str]) -> str:
    """The shortest run of letters, one a block, that gives all blocks' kinds when it is repeated."""
    letters = "".join("s" if kind == SLIDING else "f" for kind in types)
    for length in range(1, len(letters)):
        unit = letters[:length]
        if (unit * (len(letters) // length + 1)).startswith(letters):
            return unit
    return letters


def _walk(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = cast("Mapping[str, Any]", value)
            # The rope's own keys are known without the dict they stand in; others get the name before theirs.
            yield from _walk(inner, "" if key == "rope_parameters" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse(numbers: str) -> dict[str, Value] | None:
    """The fields of such a line, fit to be shown; None if it is none."""
    try:
        said: Any = json.loads(numbers) if len(numbers) <= MAX_NUMBERS else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    fields = cast("dict[str, Any]", said)
    if str(fields.get("model_type")) not in FAMILIES or not all(map(_KEY.fullmatch, fields)):
        return None
    if any(isinstance(value, dict | list) for value in fields.values()):
        return None
    return fields


def _shown(value: Value) -> str:
    """For a terminal: a string that a peer sent comes out with its control characters escaped."""
    if value is None:
        return "unset"
    return ascii(value)[:_MAX_SHOWN]
