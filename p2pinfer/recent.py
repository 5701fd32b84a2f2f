"""A bounded mapping for what is remembered of peers, who are as many as they like."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Recent(MutableMapping[_K, _V]):
    """A mapping that forgets the item set longest ago when it would hold more than `limit`.

    Unlike an LRU cache's, its order follows what is written alone: a peer that others ask about stays no
    longer for it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: dict[_K, _V] = {}  # the item set longest ago first

    def __getitem__(self, key: _K) -> _V:
        return self._items[key]

    def __setitem__(self, key: _K, value: _V) -> None:
        self._items.pop(key, None)  # a dict keeps the place of a key that it has
        self._items[key] = value
        if len(self._items) > self._limit:
            del self._items[next(iter(self._items))]

    def __delitem__(self, key: _K) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[_K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items
