"""Terminal output: results on standard output; messages, logs and warnings on standard error."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from p2pinfer.errors import LocalError

from .log_format import formatter

if TYPE_CHECKING:
    from rich.console import RenderableType


_DRAWN = str.maketrans("█·", "#.")  # what tables are drawn with, for terminals that lack it

before_output: Callable[[], None] | None = None  # what erases a line that says what is being waited for
_mid_line = False  # whether what was last written to standard output goes on in its line


class OutputClosed(Exception):
    """Reader of our standard output has gone."""


def occupy_streams() -> None:
    """Put /dev/null in place of standard streams that are closed, before a socket or the ledger takes one.

    What a library writes to standard error would else end up in there.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free: this one


def spare_no_text() -> None:
    r"""Write what a stream's encoding lacks as its escape, such as \u2192, instead of ending the command.

    Not as a question mark: an escape says what was there. An error handler that the user has chosen, say by
    PYTHONIOENCODING=latin-1:replace, stays; Python takes `strict` by itself, or `surrogateescape`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def write_out(text: str) -> None:
    """Write to standard output and flush, so that a reader sees each token as it comes.

    Raises:
        OutputClosed: The reader is gone, as after `| head -1`.
        LocalError: It cannot be written, as to a disk that is full, or is closed.
    """
    global _mid_line
    if _is_closed(sys.stdout):
        raise LocalError("standard output is closed; send it to a file, or to /dev/null")
    _make_room()
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
        _mid_line = not (text or "\n").endswith("\n")
    except BrokenPipeError as exc:
        raise OutputClosed from exc
    except OSError as exc:
        raise LocalError(f"standard output cannot be written: {exc.strerror or exc}") from exc


def read_stdin(limit: int = -1) -> bytes:
    """Everything on standard input, or its first `limit` bytes.

    Raises:
        LocalError: It is closed, or cannot be read.
    """
    if _is_closed(sys.stdin):
        raise LocalError("standard input is closed, so nothing can be read from it")
    try:
        return sys.stdin.buffer.read(limit)
    except OSError as exc:
        raise LocalError(f"standard input cannot be read: {exc.strerror or exc}") from exc


def note(text: str) -> None:
    """Say something to people, on a line of its own; with nobody left to hear it, say nothing."""
    global _mid_line
    if _is_closed(sys.stderr):
        return
    _make_room()
    with suppress(OSError):
        if _mid_line and sys.stdout.isatty() and sys.stderr.isatty():
            _mid_line = False
            text = "\n" + text
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def write_raw(text: str) -> None:
    """Write to standard error as it is: a line that is going to be erased."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _make_room() -> None:
    if before_output is not None:
        before_output()


def _is_closed(stream: TextIO | None) -> bool:
    """True if there is no such stream: Python has None for one that was closed from the beginning."""
    return stream is None or stream.closed


def print_out(renderable: RenderableType, *, whole: bool = False) -> None:
    """Write something that rich lays out to standard output; raises as `write_out` does.

    Args:
        whole: Leave lines that are too long to the terminal, instead of cutting figures off.
    """
    write_out(_laid_out(renderable, sys.stdout, whole))


def print_note(renderable: RenderableType) -> None:
    """Show people something that rich lays out."""
    note(_laid_out(renderable, sys.stderr).rstrip("\n"))


def _laid_out(renderable: RenderableType, stream: TextIO, whole: bool = False) -> str:
    """Text with colours if the stream is a terminal. Not printed by rich, which exits when a pipe breaks."""
    from rich.console import Console  # 50 ms that --help need not wait for

    console = Console(file=stream, highlight=False)
    if whole:
        unbounded = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(renderable, options=unbounded).maximum)
    with console.capture() as capture:
        console.print(renderable, crop=False)
    return capture.get() if _can_write("█·", stream) else capture.get().translate(_DRAWN)


def _can_write(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class _Handler(logging.StreamHandler[TextIO]):
    def emit(self, record: logging.LogRecord) -> None:
        _make_room()
        super().emit(record)


def set_up_logging(verbosity: int, *, level: str | None = None, form: str = "text") -> None:
    """Log to standard error: warnings; from 1 on what an operator would tell a friend; from 2 on all.

    Args:
        level: Says the same by name, and has the last word.
        form: One of `log_format.FORMATS`.
    """
    if level is not None:
        verbosity = {"debug": 2, "info": 1, "warning": 0, "error": -1}[level]
    ours = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    handler = _Handler(sys.stderr)
    handler.setFormatter(formatter(form, with_time=verbosity >= 2))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING if verbosity >= 2 else logging.CRITICAL)
    logging.getLogger("p2pinfer").setLevel(ours)
    # libp2p keeps its records from the root and removes its handlers when it is imported.
    logging.lastResort = handler if verbosity >= 2 else logging.NullHandler()
    logging.captureWarnings(True)
