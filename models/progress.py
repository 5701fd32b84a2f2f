"""Progress of long work, for whoever watches: downloads, hashing, loading."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """One bar at a time, called by the thread that asked for the work.

    `advance` comes several times a second as long as the work lasts, with 0 if need be, and may raise to
    stop it; so one that calls `trio.from_thread.check_cancelled` makes downloads end with their scope.
    """

    def start(self, label: str, total_bytes: int) -> None:
        """Work of `total_bytes` begins, in a few words."""
        ...

    def advance(self, n: int) -> None:
        """`n` more bytes are done."""
        ...

    def done(self) -> None:
        """The work ended, well or not."""
        ...


class Silent:
    """A `Progress` that nobody watches."""

    def start(self, label: str, total_bytes: int) -> None: ...

    def advance(self, n: int) -> None: ...

    def done(self) -> None: ...
