"""Queue in which everybody who brings something has a turn, however much another one brings.

Each bringer has a few places of its own, and those who have something waiting are served in turn.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final, Generic, TypeVar

from .pulse import Pulse

MAX_OF_ONE: Final = 16
MAX_BRINGERS: Final = 128

_Item = TypeVar("_Item")


class TurnQueue(Generic[_Item]):
    """Items by who brought them. What comes on top of its bringer's places is not taken."""

    def __init__(self, max_of_one: int = MAX_OF_ONE, max_bringers: int = MAX_BRINGERS) -> None:
        self._waiting: OrderedDict[str, deque[_Item]] = OrderedDict()  # whose turn is next first
        self._max_of_one = max_of_one
        self._max_bringers = max_bringers
        self._came = Pulse()

    def put(self, bringer: str, item: _Item) -> bool:
        """Let an item wait; False if its bringer has no place for it."""
        waiting = self._waiting.get(bringer)
        if waiting is None:
            if len(self._waiting) >= self._max_bringers:
                return False
            waiting = self._waiting[bringer] = deque()
        if len(waiting) >= self._max_of_one:
            return False
        waiting.append(item)
        self._came.fire()
        return True

    async def get(self) -> _Item:
        """The next bringer's oldest item, as soon as there is one."""
        while not self._waiting:
            await self._came.wait()
        bringer, waiting = self._waiting.popitem(last=False)
        item = waiting.popleft()
        if waiting:
            self._waiting[bringer] = waiting  # at the end
        return item
