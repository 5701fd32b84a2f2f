"""The types that settings have: named for people, and checked where a value did not come from a parser.

Python holds nobody to an annotation. A value of another type would do harm much later, `max_new_tokens=5.0`
as a message that no peer can read.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

from p2pinfer.errors import ConfigError

_NAMES: Final[Mapping[Any, str]] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}
_PLURALS: Final[Mapping[Any, str]] = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}
_MAX_SHOWN: Final = 60


def check_fields(config: Any) -> None:
    """Nothing, if every field of a dataclass holds what its annotation says.

    A whole number may stand for a number, and a list for a tuple.

    Raises:
        ConfigError: One does not; the message names the field, its value and what it must be.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ConfigError(f"{name} is {shown(value)}; it must be {describe_type(hint)}")


def describe_type(hint: Any) -> str:
    """A type for people: `int` -> "a whole number"."""
    if hint in _NAMES:
        return _NAMES[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(hint))
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(describe_type(part) for part in get_args(hint) if part is not types.NoneType)
    if is_table(hint):
        key, value = get_args(hint)
        return f"pairs of {describe_type(key)} and {describe_type(value)}, written KEY=VALUE"
    assert is_list(hint), f"a setting of type {hint}"
    part = get_args(hint)[0]
    return f"a list of {_PLURALS.get(part) or describe_type(part)}"


def is_list(hint: Any) -> bool:
    """Tell the type of a list, which settings hold as a tuple, from others."""
    return get_origin(hint) is tuple


def is_table(hint: Any) -> bool:
    """Tell the type of a table from others."""
    return get_origin(hint) is Mapping


def shown(value: object) -> str:
    """A value as it is written in Python, cut to what fits into a sentence."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _hints(config: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {each.name: hints[each.name] for each in dataclasses.fields(config)}


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (types.UnionType, Union):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if is_list(hint):
        part = get_args(hint)[0]
        return isinstance(value, tuple | list) and all(_fits(each, part) for each in cast("list[Any]", value))
    if is_table(hint):
        key, part = get_args(hint)
        pairs = cast("Mapping[Any, Any]", value)
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, part) for k, v in pairs.items())
    if hint in (int, float):  # True is an int to Python, and a slip of the pen here
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)
