"""Standard output carries results; what is said to people, logs and warnings go to standard error."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .failures import OutputClosed

if TYPE_CHECKING:
    from rich.console import RenderableType


def write_out(text: str) -> None:
    """Write to standard output and flush, so that a reader sees each token as it comes.

    Raises:
        OutputClosed: The reader is gone, as after `| head -1`.
    """
    with _noticing_the_end():
        sys.stdout.write(text)
        sys.stdout.flush()


def note(text: str) -> None:
    """Say something to people; with nobody left to hear it, say nothing."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except (BrokenPipeError, ValueError):
        return


def print_out(renderable: RenderableType) -> None:
    """Print something that rich lays out, as a result.

    Raises:
        OutputClosed: The reader is gone.
    """
    from rich.console import Console  # 50 ms that --help need not wait for

    with _noticing_the_end():
        Console(highlight=False).print(renderable)


def print_note(renderable: RenderableType) -> None:
    """Print something that rich lays out, for people."""
    from rich.console import Console  # 50 ms that --help need not wait for

    Console(file=sys.stderr, highlight=False).print(renderable)


def silence_output() -> None:
    """Point standard output to nowhere, so that the interpreter's last flush cannot fail."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    finally:
        os.close(devnull)


def set_up_logging(verbosity: int) -> None:
    """Log to standard error: warnings; from 1 on what an operator would tell a friend; from 2 on all."""
    ours = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    theirs = logging.WARNING if verbosity >= 2 else logging.CRITICAL
    handler = logging.StreamHandler(sys.stderr)
    pattern = "%(levelname).1s %(name)s: %(message)s" if verbosity < 2 else "%(asctime)s " + _DEBUG_PATTERN
    handler.setFormatter(logging.Formatter(pattern))
    logging.basicConfig(level=theirs, handlers=[handler], force=True)
    logging.getLogger("p2pinfer").setLevel(ours)
    logging.captureWarnings(True)
    if verbosity < 2:
        warnings.simplefilter("ignore")


_DEBUG_PATTERN = "%(levelname)-7s %(name)s: %(message)s"


@contextmanager
def _noticing_the_end() -> Generator[None]:
    try:
        yield
    except BrokenPipeError as exc:
        raise OutputClosed from exc
