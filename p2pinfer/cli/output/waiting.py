"""Waiting, shown on standard error: one changing line on a terminal, separate lines elsewhere.

Nothing is said of what takes less than half a second. A thread of its own says it, since what takes long may
hold up the event loop; the import of torch holds up the thread too, so that is said before it begins.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, TextIO

from . import terminal

PATIENCE_S: Final = 0.3  # so that it is there within half a second
_LOOK_S: Final = 0.1  # between looks at what is being waited for
_FRAMES: Final = "|/-\\"


class WaitingLine:
    """Says what is being waited for until the block ends. Any thread may tell it.

    Args:
        quiet: Say nothing.
        patience_s: How long a wait is not worth a word.

    Attributes:
        text: What is waited for.
        is_said: Whether that was worth a word.
    """

    def __init__(self, *, quiet: bool = False, patience_s: float | None = None) -> None:
        stream: TextIO | None = sys.stderr
        self._quiet = quiet or stream is None
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._in_place = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._describe: Callable[[], str] | None = None
        self.text: str = ""
        self._began = self._quiet_since = 0.0
        self.is_said: bool = False
        self._is_drawn = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="waiting", daemon=True)

    def __enter__(self) -> WaitingLine:
        terminal.before_output = self.erase
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.pause()
        self._ended.set()
        terminal.before_output = None

    def say(self, what: str | Callable[[], str], *, at_once: bool = False) -> None:
        """Wait for `what` from here on.

        Args:
            what: The words, or what gives them, which is asked again and again.
            at_once: It is known to take long, or nothing could be said while it does.
        """
        with self._lock:
            self._describe = what if callable(what) else lambda: what
            self._note_text()
            if at_once and not self._quiet:
                self._show()

    def pause(self) -> None:
        """Wait for nothing, or let somebody else tell."""
        with self._lock:
            self._describe = None
            self.text = ""
            self.erase()

    def erase(self) -> None:
        """Make room for something else to be written; the line is back when that was long enough ago."""
        with self._lock:
            self._quiet_since = time.monotonic()
            if self._is_drawn:
                self._is_drawn = False
                terminal.write_raw("\r\x1b[K")

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            with self._lock:
                if self._describe is None:
                    continue
                self._note_text()
                now = time.monotonic()
                if now - max(self._began, self._quiet_since) >= self._patience_s or self._is_drawn:
                    self._show()

    def _note_text(self) -> None:
        text = self._describe() if self._describe is not None else ""
        if text != self.text:
            self.text, self.is_said, self._began = text, False, time.monotonic()

    def _show(self) -> None:
        if self._in_place:
            waited_s = time.monotonic() - self._began
            frame = _FRAMES[int(waited_s / 0.1) % len(_FRAMES)]
            line = f"{frame} {self.text} ..." + (f" {waited_s:.0f} s" if waited_s >= 2 else "")
            terminal.write_raw("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
            self._is_drawn = True
        elif not self.is_said:
            terminal.note(f"{self.text} ...")
        self.is_said = True
