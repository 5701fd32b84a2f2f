"""Progress on standard error: downloads, hashing, loading and waiting."""

from __future__ import annotations

import sys
import threading

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.status import Status

from .terminal import note
from .waiting import WaitingLine

_WORTH_A_LINE_BYTES = 64 << 20  # off a terminal only work that keeps somebody waiting is mentioned


class Bars:
    """A `models.progress.Progress`: a bar on a terminal, a line before long work elsewhere.

    The bar is gone when the work is done, so it never stands between the lines that stay.
    """

    def __init__(self, *, quiet: bool = False, waiting: WaitingLine | None = None) -> None:
        self._quiet = quiet
        self._waiting = waiting
        self._console = Console(file=sys.stderr)
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, label: str, total_bytes: int) -> None:
        if self._quiet:
            return
        if not self._console.is_terminal:
            if total_bytes >= _WORTH_A_LINE_BYTES:
                note(f"{label} ({total_bytes / (1 << 20):,.0f} MiB)")
            elif self._waiting is not None:
                self._waiting.say(label)
            return
        if self._waiting is not None:
            self._waiting.pause()
        with self._lock:
            self._stop()
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._progress.add_task(label, total=total_bytes or None)
            self._progress.start()

    def advance(self, n: int) -> None:
        with self._lock:
            if self._progress is not None and self._task is not None:
                self._progress.advance(self._task, n)

    def done(self) -> None:
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


class NodesStarting:
    """Says that no swarm is in reach and counts the nodes started instead: a spinner, or a line elsewhere.

    Called with how many are ready of how many. A context manager, lest it spin on after an error.
    """

    def __init__(self, *, quiet: bool = False, waiting: WaitingLine | None = None) -> None:
        self._quiet = quiet
        self._waiting = waiting
        self._console = Console(file=sys.stderr)
        self._status: Status | None = None

    def __call__(self, ready: int, total: int) -> None:
        text = f"no swarm in reach: starting {total} nodes on this computer"
        if self._waiting is not None:
            self._waiting.pause()
        if self._quiet:
            return
        if not self._console.is_terminal:
            if not ready:
                note(text)
            return
        self._status = self._status or self._console.status("")
        self._status.update(f"{text}, {ready} ready")
        self._status.start()
        if ready == total:
            self._status.stop()

    def __enter__(self) -> NodesStarting:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._status is not None:
            self._status.stop()
