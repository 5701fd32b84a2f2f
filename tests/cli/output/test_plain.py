"""What strangers write does nothing to a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.cli.output.plain import LINE_CHARS, one_line, printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b[31mevil\n", r"\x1b[31mevil"),
        ("\x9b31mevil", r"\x9b31mevil"),
        ("title\x1b]0;mine\x07", r"title\x1b]0;mine\x07"),
        ("exe\u202etxt", r"exe\u202etxt"),
        ("half \ud83d", r"half \ud83d"),
        ("a\u00a0b\t c\r\nd", "a b c d"),
        ("na\u00efve \u65e5\u672c \U0001f642", "na\u00efve \u65e5\u672c \U0001f642"),
    ],
)
def test_what_does_not_print_is_shown_as_its_escape(text: str, line: str) -> None:
    assert one_line(text) == line


def test_an_endless_message_is_cut() -> None:
    assert one_line("a" * LINE_CHARS) == "a" * LINE_CHARS
    assert len(one_line("\x1b" * LINE_CHARS)) == LINE_CHARS
    assert len(one_line("a" * (LINE_CHARS + 1))) == LINE_CHARS


def test_spaces_stay_where_a_text_is_laid_out() -> None:
    assert printable("  two\x1b  wide") == "  two\\x1b  wide"


@given(st.text(st.characters(codec=None), max_size=40))
def test_every_line_prints_and_can_be_encoded(text: str) -> None:
    line = one_line(text, 20)
    assert line.isprintable()
    assert len(line) <= 20
    line.encode()
