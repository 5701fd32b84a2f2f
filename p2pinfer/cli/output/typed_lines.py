"""Lines that a person types, or that are piped in, for as long as there are any."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Final

_PROMPT: Final = "> "
_MORE: Final = ". "
_READ_BYTES: Final = 1 << 16


class TypedLines:
    """Reads standard input line by line, with history and editing where it is a terminal. For one thread."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._held = b""
        if self._is_terminal:
            with suppress(ImportError):  # Windows has none, and edits lines by itself
                import_module("readline")  # input() uses it where it is imported

    def next(self, goes_on: bool) -> str | None:
        """The next line without its end; None if there is none. `goes_on`: it belongs to the last one."""
        if self._is_terminal:
            try:
                return input(_MORE if goes_on else _PROMPT)
            except EOFError:
                return None
        # Not sys.stdin: who is left inside its buffer when the program ends, lets Python abort.
        while b"\n" not in self._held:
            read = b"" if sys.stdin is None else os.read(sys.stdin.fileno(), _READ_BYTES)
            if not read:
                break
            self._held += read
        if not self._held:
            return None
        line, _, self._held = self._held.partition(b"\n")
        return line.removesuffix(b"\r").decode("utf-8", "replace")


@contextmanager
def terminal_kept() -> Generator[None]:
    """Leave the terminal as it was found, also if a line is being typed when the block ends."""
    try:
        import termios

        before = termios.tcgetattr(sys.stdin.fileno())
    except (ImportError, OSError, ValueError, AttributeError):  # no terminal, or Windows
        yield
        return
    except Exception as exc:  # termios.error, which is no OSError
        if type(exc).__name__ != "error":
            raise
        yield
        return
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
