"""The depth of MessagePack, told without recursion."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.routing.nesting import MAX_DEPTH, nests_too_deep

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=300)
    | st.text(max_size=300)
    | st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=40))
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=30,
)


def depth_of(value: object) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth_of, cast("list[object]", value)), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth_of, cast("dict[object, object]", value).values()), default=0)
    return 0


def wrapped(value: Any, arrays: list[bool]) -> Any:
    for is_array in arrays:
        value = [b"\x91" * 40, value] if is_array else {"k": value}
    return value


@given(values, st.lists(st.booleans(), max_size=MAX_DEPTH + 8))
def test_it_is_the_depth_of_what_was_encoded(value: Any, around: list[bool]) -> None:
    whole = wrapped(value, around)
    assert nests_too_deep(msgspec.msgpack.encode(whole)) == (depth_of(whole) > MAX_DEPTH)


@given(st.binary(max_size=200))
def test_any_bytes_are_walked_to_an_end(content: bytes) -> None:
    nests_too_deep(content)
    nests_too_deep(b"\x93" * MAX_DEPTH + content)


@pytest.mark.parametrize("opening", [b"\x91", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01", b"\x81\xc0"])
def test_a_bomb_is_refused_whatever_its_levels_are(opening: bytes) -> None:
    assert nests_too_deep(opening * 5000 + b"\xc0")
    assert nests_too_deep(opening * (MAX_DEPTH + 1) + b"\xc0")
    assert not nests_too_deep(opening * MAX_DEPTH + b"\xc0")
