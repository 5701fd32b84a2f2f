"""Nesting depth of MessagePack, bounded before a decoder recurses into it.

msgspec skips fields that it does not know by recursion, down to the interpreter's limit: 1,000 levels in
Python 3.11, 10,000 in 3.12, and as many as the thread's stack holds in 3.14. What a peer may nest must not
depend on that.
"""

from __future__ import annotations

from typing import Final

MAX_DEPTH: Final = 32  # of arrays and maps; no message of this project has more than 5

_CONTAINERS: Final = frozenset((*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF))
_NOT_CONTAINERS: Final = bytes(set(range(256)) - _CONTAINERS)
# Formats of a fixed size, by their first byte, and the bytes that follow it.
_FIXED: Final = {
    **dict.fromkeys((0xCC, 0xD0), 1),
    **dict.fromkeys((0xCD, 0xD1, 0xD4), 2),
    0xD5: 3,
    **dict.fromkeys((0xCA, 0xCE, 0xD2), 4),
    0xD6: 5,
    **dict.fromkeys((0xCB, 0xCF, 0xD3), 8),
    0xD7: 9,
    0xD8: 17,
}
# Formats with a length, by their first byte: the bytes of the length, and of a type that follows it.
_SIZED: Final = {
    **dict.fromkeys((0xC4, 0xD9), (1, 0)),
    **dict.fromkeys((0xC5, 0xDA), (2, 0)),
    **dict.fromkeys((0xC6, 0xDB), (4, 0)),
    0xC7: (1, 1),
    0xC8: (2, 1),
    0xC9: (4, 1),
}


def nests_too_deep(encoded: bytes) -> bool:
    """True if MessagePack has more than `MAX_DEPTH` arrays and maps inside each other.

    Bytes that are not MessagePack are left to the decoder, which refuses them.
    """
    # Each level takes a byte that begins a container, so most messages need no walk.
    if len(encoded.translate(None, _NOT_CONTAINERS)) <= MAX_DEPTH:
        return False
    left = [1]  # values still to come, at each depth
    at = 0
    while left and at < len(encoded):
        if not left[-1]:
            left.pop()
            continue
        left[-1] -= 1
        first = encoded[at]
        at += 1
        if first in _CONTAINERS:
            if len(left) > MAX_DEPTH:
                return True
            at, count = _count(encoded, at, first)
            left.append(count)
        elif 0xA0 <= first < 0xC0:
            at += first - 0xA0
        elif first in _FIXED:
            at += _FIXED[first]
        elif first in _SIZED:
            length_bytes, type_bytes = _SIZED[first]
            at += length_bytes + type_bytes + int.from_bytes(encoded[at : at + length_bytes])
    return False


def _count(encoded: bytes, at: int, first: int) -> tuple[int, int]:
    """Start of a container's content, and its number of values."""
    if first < 0x90:
        return at, 2 * (first - 0x80)
    if first < 0xA0:
        return at, first - 0x90
    length_bytes = 2 if first in (0xDC, 0xDE) else 4
    count = int.from_bytes(encoded[at : at + length_bytes])
    return at + length_bytes, count * (2 if first in (0xDE, 0xDF) else 1)
