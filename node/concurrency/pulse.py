"""Events that happen again and again: one for all who wait, one for whoever has the work.

What a decoded token meets keeps a plain `trio.Event` that is replaced (`session/in_flight.py`, for one):
a call more in a hundred places is what a step is slow by.
"""

from __future__ import annotations

import trio


class Pulse:
    """Wakes all who wait at that moment, and nobody who comes later.

    To miss nothing between a look and the wait, take `next` first:

        news = pulse.next
        look()
        await news.wait()
    """

    def __init__(self) -> None:
        self.next = trio.Event()  # set with the next `fire`, and replaced

    def fire(self) -> None:
        """Wake all who wait."""
        self.next.set()
        self.next = trio.Event()

    async def wait(self) -> None:
        """Wait for the next `fire`."""
        await self.next.wait()


class AutoResetEvent:
    """Remembers that there is something to do until the one task that does it takes it up."""

    def __init__(self) -> None:
        self._due = trio.Event()

    def set(self) -> None:
        """Have it done; once, however often this is called before it is taken up."""
        self._due.set()

    async def wait(self) -> None:
        """Wait until there is something to do. What is called for from here on is for the next time."""
        await self._due.wait()
        self._due = trio.Event()
