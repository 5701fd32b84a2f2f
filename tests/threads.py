"""Threads under a clock that jumps: none, since it takes a task that waits for one for idle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio


def do_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what would go to a thread be done in the event loop.

    While a thread works, a clock that jumps would go to the next deadline, whose work that thread may be. A
    threshold only moves this to where the machine is slower.
    """
    monkeypatch.setattr(trio.to_thread, "run_sync", _run_here)


async def _run_here(call: Callable[..., Any], *args: Any, **_: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return call(*args)
