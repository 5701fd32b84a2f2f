"""Log records for people and for programs."""

from __future__ import annotations

import json
import logging
import sys

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.cli.output.log_format import formatter


def record(message: str, *args: object, error: bool = False) -> logging.LogRecord:
    exc_info = None
    if error:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            exc_info = sys.exc_info()
    made = logging.LogRecord("p2pinfer.node", logging.WARNING, __file__, 1, message, args, exc_info)
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def test_text_is_for_people() -> None:
    assert (
        formatter("text", with_time=False).format(record("hello %s", "you")) == "W p2pinfer.node: hello you"
    )


def test_text_keeps_the_escapes_of_strangers_off_the_terminal() -> None:
    assert "\x1b" not in formatter("text", with_time=True).format(record("%s", "\x1b[31mred"))


def test_logfmt_quotes_only_what_needs_it() -> None:
    assert formatter("logfmt", with_time=False).format(record('session.open peer="%s"', "a\nb")) == (
        "time=2023-11-14T22:13:20.250Z level=warning logger=p2pinfer.node "
        'message="session.open peer=\\"a\\nb\\""'
    )
    assert formatter("logfmt", with_time=False).format(record("done")).endswith(" message=done")


def test_json_is_an_object_on_a_line() -> None:
    line = formatter("json", with_time=False).format(record("it failed", error=True))
    assert "\n" not in line
    said = json.loads(line)
    assert said["level"] == "warning"
    assert said["time"] == "2023-11-14T22:13:20.250Z"
    assert said["message"] == "it failed"
    assert "ValueError: two\nlines" in said["traceback"]


@given(st.text(), st.sampled_from(["logfmt", "json"]))
def test_whatever_is_said_stays_on_one_printable_line(text: str, form: str) -> None:
    line = formatter(form, with_time=False).format(record("%s", text))
    assert line.isprintable()
    if form == "json":
        assert json.loads(line)["message"] == text
