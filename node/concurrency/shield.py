"""Work that a cancellation must not interrupt."""

from __future__ import annotations

import trio


def shielded(seconds: float) -> trio.CancelScope:
    """A scope that no cancellation from outside enters, for at most `seconds`."""
    scope = trio.move_on_after(seconds)
    scope.shield = True  # as an argument, it is unknown to the type stubs that libp2p drags in
    return scope
