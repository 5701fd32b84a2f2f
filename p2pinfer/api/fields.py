"""Fields of a request: decoded by their types, and refused with a reason where they are not honoured.

A field that is ignored gives an answer that was not asked for, and nobody is told. So every field of a
dialect is one that is honoured, one that changes no answer, or one that must have a value that changes none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import msgspec

from .errors import ApiError

_Request = TypeVar("_Request", bound=msgspec.Struct)
_AT: Final = re.compile(r"^(.*) - at `\$\.?(.*?)`$", re.DOTALL)
_STOP_CHARS: Final = 1000
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`")


@dataclass(frozen=True, slots=True)
class Unhonoured:
    """A field that is not honoured.

    Attributes:
        reason: Why, as the end of a sentence.
        neutral: Values that ask for nothing.
    """

    reason: str
    neutral: Sequence[object] = (None,)


def decode(
    body: bytes,
    kind: type[_Request],
    unhonoured: Mapping[str, Unhonoured],
    harmless: frozenset[str],
) -> _Request:
    """The request in a body.

    Args:
        kind: Has a field for each that is honoured, and forbids others.
        unhonoured: Fields that must be neutral.
        harmless: Fields that change no answer, whatever they say.

    Raises:
        ApiError: It is no such request.
    """
    try:
        said: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ApiError(f"the request is not JSON: {exc}") from exc
    if not isinstance(said, dict):
        raise ApiError("the request must be a JSON object")
    fields = cast("dict[str, Any]", said)
    check_neutral(fields, unhonoured)
    kept = {name: value for name, value in fields.items() if name not in unhonoured and name not in harmless}
    try:
        return msgspec.convert(kept, kind)
    except msgspec.ValidationError as exc:
        raise _refused(str(exc)) from exc
    except RecursionError as exc:
        raise ApiError("the request is nested too deeply") from exc


def check_neutral(fields: Mapping[str, object], unhonoured: Mapping[str, Unhonoured]) -> None:
    """Nothing, if no field asks for what is not honoured.

    Raises:
        ApiError: One does.
    """
    for name, field in unhonoured.items():
        if fields.get(name) not in field.neutral:
            raise ApiError(f"{name} is not supported: {field.reason}", param=name)


def bounded(value: float | None, name: str, least: float, most: float) -> None:
    """Nothing, if the value is None or within the bounds.

    Raises:
        ApiError: It is not.
    """
    if value is not None and not least <= value <= most:
        raise ApiError(f"{name} is {value:g}; it must be from {least:g} to {most:g}", param=name)


def stops(value: str | Sequence[str] | None, most: int, name: str = "stop") -> tuple[str, ...]:
    """Stop texts, of a field that holds one or several.

    Raises:
        ApiError: There are too many, or one is empty.
    """
    texts = (value,) if isinstance(value, str) else tuple(value or ())
    if len(texts) > most or any(not text or len(text) > _STOP_CHARS for text in texts):
        raise ApiError(f"{name} takes up to {most} texts of 1 to {_STOP_CHARS} characters each", param=name)
    return texts


def _refused(message: str) -> ApiError:
    found = _AT.match(message)
    reason, where = (found[1], found[2]) if found else (message, "")
    if unknown := _UNKNOWN.fullmatch(reason):
        name = f"{where}.{unknown[1]}" if where else unknown[1]
        return ApiError(f"{name[:200]} is not a field that this server knows; leave it out", param=name[:200])
    return ApiError(f"{where or 'the request'}: {reason}", param=where or None)
