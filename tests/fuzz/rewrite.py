"""Changes one value inside an encoded message, however deep, and encodes it again.

Flipped bytes rarely get past a decoder's first look. This keeps the form and changes what is said: a number
at its bound, a field more or less, a list that goes on, half of another message of the same kind. Bytes that
hold a message themselves, as those of signed records do, are opened and closed again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Final

import msgspec

ODD_VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, -1, 0, 1, 2, 255, 1 << 16, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1),
    *(0.0, -0.0, 0.5, 1.0, 1e-300, 1e6, 1e300, float("inf"), float("-inf"), float("nan")),
    *("", "\0", "a", "float32", "float16", "output", "equivocation", "x" * 300, "\N{SNOWMAN}" * 9, "\ud800"),
    *(b"", bytes(16), bytes(32), b"\xff" * 40, bytes(64), [], [[[[[[]]]]]], {}, {"a": 1}),
)
_MOST_BYTES: Final = 1 << 16
_SIGNATURE_BYTES: Final = 64


def rewrite(given: bytes, rng: random.Random) -> bytes:
    """`given` with one value changed, as MessagePack or JSON; as it was if it is neither."""
    if given[:1] in (b"{", b"["):
        return _rewrite_json(given, rng)
    body, ending = _opened(given)
    if body is None:
        return given
    try:
        return msgspec.msgpack.encode(_changed(body, rng))[:_MOST_BYTES] + ending
    except (OverflowError, RecursionError, UnicodeEncodeError):
        return given


def _rewrite_json(given: bytes, rng: random.Random) -> bytes:
    try:
        written = json.dumps(_changed(json.loads(given), rng), default=lambda value: None)
    except (ValueError, TypeError, RecursionError):
        return given
    return written.encode("utf-8", "surrogatepass")[:_MOST_BYTES]


def _opened(given: bytes) -> tuple[Any, bytes]:
    """The message in `given`, and the signature that may follow it; None if it is none."""
    for cut in (len(given), len(given) - _SIGNATURE_BYTES):
        if cut <= 0:
            continue
        try:
            return msgspec.msgpack.decode(given[:cut]), given[cut:]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError):
            continue
    return None, b""


def _changed(value: object, rng: random.Random) -> Any:
    """`value` with one thing in it changed."""
    kind = type(value)
    change = _CHANGES.get(kind)
    if change is None or (rng.random() < 0.4 and kind not in (dict, list)):
        return rng.choice(ODD_VALUES)
    return change(value, rng)


def _changed_bytes(value: bytes, rng: random.Random) -> bytes:
    return rewrite(value, rng) if len(value) > 40 and rng.random() < 0.8 else _bitten(value, rng)


def _changed_text(value: str, rng: random.Random) -> str:
    return _bitten(value.encode("utf-8", "replace"), rng).decode("utf-8", "replace")


def _changed_list(values: list[Any], rng: random.Random) -> list[Any]:
    if not values or rng.random() < 0.03:
        return [*values, rng.choice(ODD_VALUES)]
    at = rng.randrange(len(values))
    draw = rng.random()
    if draw < 0.82:
        return [*values[:at], _changed(values[at], rng), *values[at + 1 :]]
    other = rng.randrange(len(values))
    ways: tuple[Callable[[], list[Any]], ...] = (
        lambda: values[:at] + values[at + 1 :],
        lambda: [*values, values[at]],
        lambda: values[:at],
        lambda: values + values * rng.randrange(20),
        lambda: [*values[:at], values[other], *values[at + 1 :]],
    )
    return rng.choice(ways)()


def _changed_dict(values: dict[Any, Any], rng: random.Random) -> dict[Any, Any]:
    if not values or rng.random() < 0.1:
        return {**values, rng.choice(("a", "", "ban", "notes", "x" * 200)): rng.choice(ODD_VALUES)}
    key = rng.choice(list(values))
    if rng.random() < 0.1:
        return {each: value for each, value in values.items() if each != key}
    return {**values, key: _changed(values[key], rng)}


def _bitten(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    if rng.random() < 0.5 and content:
        at %= len(content)
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    return content[:at] + rng.randbytes(rng.randrange(4)) + content[at + rng.randrange(4) :]


_CHANGES: Final[dict[type, Callable[[Any, random.Random], Any]]] = {
    dict: _changed_dict,
    list: _changed_list,
    bytes: _changed_bytes,
    str: _changed_text,
    int: lambda value, rng: value + rng.choice((-2, -1, 1, 2)),
    float: lambda value, rng: value * rng.choice((-1.0, 0.5, 2.0, 1e6)),
}
