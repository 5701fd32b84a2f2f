"""What a failure is told as, and what it exits with."""

from __future__ import annotations

import click
import pytest

from p2pinfer.cli.failures import Interrupted, describe_failure, most_telling
from p2pinfer.cli.output.terminal import OutputClosed
from p2pinfer.errors import (
    AddressUnusable,
    CheckpointError,
    ConfigError,
    NoRoute,
    PeerVanished,
    PolicyError,
    SpanOutOfRange,
)


@pytest.mark.parametrize(
    ("error", "message", "exit_code"),
    [
        (ConfigError("no such setting"), "no such setting", 2),
        (PolicyError("no such policy"), "no such policy", 2),
        (SpanOutOfRange("no such blocks"), "no such blocks", 2),
        (CheckpointError("truncated"), "truncated", 1),
        (AddressUnusable("taken"), "taken", 1),
        (PeerVanished("gone"), "gone", 1),
        (NoRoute("nobody serves 0:4"), "nobody serves 0:4", 1),
        (CheckpointError("two\n  lines"), "two lines", 1),
        (PeerVanished("\x1b[31mevil\n"), r"\x1b[31mevil", 1),
        (KeyboardInterrupt(), "", 130),
        (click.Abort(), "", 130),
        (Interrupted(2), "", 130),
        (Interrupted(15), "", 143),
        (OutputClosed(), "", 141),
        (ZeroDivisionError("by 0"), "unexpected ZeroDivisionError: by 0; run with -vv for the traceback", 70),
        (AssertionError(), "unexpected AssertionError; run with -vv for the traceback", 70),
        (click.UsageError("what?"), "what? (p2pinfer --help)", 2),
        (click.ClickException("no"), "no", 1),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(error: BaseException, message: str, exit_code: int) -> None:
    failure = describe_failure(error)
    assert (failure.message, failure.exit_code) == (message, exit_code)


def test_a_usage_error_names_the_command_whose_help_tells_more() -> None:
    context = click.Context(click.Command("node"), info_name="p2pinfer node")
    assert describe_failure(click.UsageError("what?", context)).message == "what? (p2pinfer node --help)"


def test_of_a_group_the_cause_is_told_and_not_its_companions() -> None:
    companions = ExceptionGroup(
        "", [PeerVanished("gone"), ExceptionGroup("", [CheckpointError("truncated")])]
    )
    assert describe_failure(companions).message == "truncated"
    assert str(most_telling(ExceptionGroup("", [PeerVanished("gone"), NoRoute("none")]))) == "none"
    assert str(most_telling(ExceptionGroup("", [ValueError("odd"), PeerVanished("gone")]))) == "gone"
    assert str(most_telling(ExceptionGroup("", [ValueError("odd"), KeyError("odder")]))) == "odd"


def test_ctrl_c_outweighs_what_it_brought_down() -> None:
    group = BaseExceptionGroup("", [CheckpointError("truncated"), KeyboardInterrupt()])
    assert describe_failure(group).exit_code == 130


def test_json_has_the_kind_and_the_blocks_that_are_missing() -> None:
    assert describe_failure(NoRoute("nobody", missing=[(0, 3), (5, 8)])).to_dict() == {
        "event": "error",
        "error": "nobody",
        "kind": "NoRoute",
        "missing": [[0, 3], [5, 8]],
    }
    assert describe_failure(ConfigError("no")).to_dict() == {
        "event": "error",
        "error": "no",
        "kind": "ConfigError",
    }
