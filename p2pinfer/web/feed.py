"""Feed of a client's events, which any number of pages follow.

A page that comes later is first told of the sessions that are open. One that reads too slowly is let go and
comes back by itself: its events were lost, and what it then hears first is the state as it is.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.events import Event, HopReplaced, SessionEnded, SessionStarted

_BEHIND: Final = 256  # events that a page may have yet to read
MAX_PAGES: Final = 64


@dataclass(frozen=True, slots=True)
class Following:
    """State at the beginning, and what happens after it.

    Attributes:
        begun: Sessions that are open, each with its present route.
        events: Ends where the page fell too far behind.
    """

    begun: tuple[SessionStarted, ...]
    events: trio.MemoryReceiveChannel[Event]


class Feed:
    """Passes on events; give `report` to the client as its `on_event`."""

    def __init__(self) -> None:
        self._pages: set[trio.MemorySendChannel[Event]] = set()
        self._open: dict[str, SessionStarted] = {}  # by session, with the route it has now

    def report(self, event: Event) -> None:
        """Pass an event on to every page."""
        match event:
            case SessionStarted():
                self._open[event.session] = event
            case HopReplaced() if event.session in self._open:
                begun = self._open[event.session]
                self._open[event.session] = SessionStarted(event.session, event.route, begun.max_tokens)
            case SessionEnded():
                self._open.pop(event.session, None)
            case _:
                pass
        for page in tuple(self._pages):
            try:
                page.send_nowait(event)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._let_go(page)

    @contextmanager
    def follow(self) -> Generator[Following | None]:
        """Open sessions, and events from now on; None if too many follow already."""
        if len(self._pages) >= MAX_PAGES:
            yield None
            return
        page, events = trio.open_memory_channel[Event](_BEHIND)
        self._pages.add(page)
        try:
            yield Following(tuple(self._open.values()), events)
        finally:
            self._let_go(page)
            events.close()

    def _let_go(self, page: trio.MemorySendChannel[Event]) -> None:
        self._pages.discard(page)
        page.close()
