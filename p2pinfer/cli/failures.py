"""Failures as one line and an exit code each."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple, cast

import click

from p2pinfer.cli.output.plain import one_line
from p2pinfer.cli.output.terminal import OutputClosed
from p2pinfer.errors import (
    ConfigError,
    LocalError,
    NoRoute,
    P2PInferError,
    PolicyError,
    SpanOutOfRange,
    Unfinished,
)

USAGE = 2
UNEXPECTED = 70  # EX_SOFTWARE of sysexits(3)
INTERRUPTED = 128 + signal.SIGINT
OUTPUT_CLOSED = 141  # 128 + SIGPIPE, which Windows has no name for
MESSAGE_CHARS = 2000  # our own messages end with what to do, after a list of peers or a node's last words

_USAGE_ERRORS = (ConfigError, PolicyError, SpanOutOfRange)


class Interrupted(Exception):
    """A signal asked us to stop, and everything was put away."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


class Failure(NamedTuple):
    """Message and exit code of a failure. An empty message means: print nothing."""

    message: str
    exit_code: int
    error: BaseException

    def to_dict(self) -> dict[str, object]:
        """The failure as `--json` prints it."""
        described: dict[str, object] = {
            "event": "error",
            "error": self.message,
            "kind": type(self.error).__name__,
        }
        if isinstance(self.error, NoRoute):
            described["missing"] = [list(gap) for gap in self.error.missing]
        if isinstance(self.error, Unfinished):
            described["text"] = self.error.text
            described["resume_token"] = self.error.resume_token
        return described


def describe_failure(error: BaseException) -> Failure:
    """The one thing worth saying about an exception, whatever groups and companions it arrived with."""
    leaf = most_telling(error)
    match leaf:
        case Interrupted():
            return Failure("", 128 + leaf.signum, leaf)
        case KeyboardInterrupt():
            return Failure("", INTERRUPTED, leaf)
        case click.Abort():  # what click makes of a Ctrl-C that no command caught
            return Failure("", INTERRUPTED, leaf)
        case OutputClosed():
            return Failure("", OUTPUT_CLOSED, leaf)
        case click.UsageError():
            command = leaf.ctx.command_path if leaf.ctx else "p2pinfer"
            return Failure(f"{leaf.format_message()} ({command} --help)", USAGE, leaf)
        case click.ClickException():
            return Failure(leaf.format_message(), leaf.exit_code, leaf)
        case P2PInferError():
            exit_code = USAGE if isinstance(leaf, _USAGE_ERRORS) else 1
            return Failure(one_line(str(leaf), MESSAGE_CHARS), exit_code, leaf)
        case _:
            what = one_line(f"unexpected {type(leaf).__name__}: {leaf}", MESSAGE_CHARS).rstrip(": ")
            return Failure(f"{what}; run with -vv for the traceback", UNEXPECTED, leaf)


def most_telling(error: BaseException) -> BaseException:
    """The exception of a group that says why: a signal, then what we did wrong, then what others did."""
    leaves = list(_leaves(error))
    order = (KeyboardInterrupt, Interrupted, OutputClosed, LocalError, NoRoute, P2PInferError)
    for kind in order:
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(inner)
    else:
        yield error
