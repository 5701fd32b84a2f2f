"""Results to standard output, the rest to standard error."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.text import Text

from p2pinfer.cli.output.terminal import (
    OutputClosed,
    note,
    print_note,
    print_out,
    set_up_logging,
    spare_no_text,
    write_out,
)
from p2pinfer.errors import LocalError


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_results_and_notes_go_their_own_ways(capsys: pytest.CaptureFixture[str]) -> None:
    write_out("result\n")
    note("note")
    print_out(Text("laid out", style="bold"))
    print_note(Text("for people", style="bold"))
    said = capsys.readouterr()
    assert said.out == "result\nlaid out\n"
    assert said.err == "note\nfor people\n"


@pytest.mark.parametrize(
    ("is_terminal", "text", "shown"),
    [
        (True, "Once", "Once\nnote\n"),
        (True, "Once\n", "Once\nnote\n"),
        (True, "Once\n\n", "Once\n\nnote\n"),
        (False, "Once", "Oncenote\n"),  # a file has what was generated and nothing else
    ],
)
def test_a_note_in_the_middle_of_a_text_has_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, text: str, shown: str
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: is_terminal)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    write_out(text)
    note("note")
    assert terminal.getvalue() == shown
    write_out(" more\n")
    note("note")
    assert terminal.getvalue() == shown + " more\nnote\n"


def test_a_reader_that_left_ends_the_command_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    out = os.fdopen(closed_pipe(), "w")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(OutputClosed):
        write_out("text")
    with pytest.raises(BrokenPipeError):
        out.close()


def test_a_disk_that_is_full_is_one_line_and_notes_are_not_worth_failing_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1))
    with pytest.raises(LocalError, match="standard output cannot be written: No space left on device"):
        write_out("text")
    note("text")
    for stream in (sys.stdout, sys.stderr):
        with pytest.raises(OSError, match="No space left"):
            stream.close()


def test_nobody_to_tell_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    err = os.fdopen(closed_pipe(), "w")
    monkeypatch.setattr(sys, "stderr", err)
    note("text")
    with pytest.raises(BrokenPipeError):
        err.close()


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_no_color_is_respected(
    no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    print_out(Text("red", style="red"))
    assert ("\x1b[31m" in capsys.readouterr().out) is coloured


@pytest.mark.parametrize(
    ("verbosity", "heard"),
    [
        (-1, {"error"}),
        (0, {"error", "warning"}),
        (1, {"error", "warning", "info"}),
        (2, {"error", "warning", "info", "debug", "theirs"}),
        (3, {"error", "warning", "info", "debug", "theirs"}),
    ],
)
def test_each_v_says_more(verbosity: int, heard: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(verbosity)
    ours = logging.getLogger("p2pinfer.somewhere")
    for level in ("debug", "info", "warning", "error"):
        getattr(ours, level)(level)
    logging.Logger("without handlers").warning("theirs")
    said = capsys.readouterr()
    assert said.out == ""
    assert {line.rpartition(": ")[2] for line in said.err.splitlines()} == heard


def test_warnings_of_libraries_are_for_the_very_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    warnings.simplefilter("always")
    set_up_logging(0)
    warnings.warn("odd", stacklevel=1)
    assert capsys.readouterr().err == ""
    set_up_logging(2)
    warnings.warn("odd", stacklevel=1)
    assert "odd" in capsys.readouterr().err


def test_what_a_log_line_quotes_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(0)
    logging.getLogger("p2pinfer.somewhere").warning("refused: %s", "\x1b[31mevil\n")
    assert capsys.readouterr().err == "W p2pinfer.somewhere: refused: \\x1b[31mevil\n\n"


@pytest.mark.parametrize(
    ("encoding", "errors", "written"),
    [
        ("cp1252", "strict", rb"\u2192 " + b"\xe9" + rb" \U0001f600"),
        ("latin-1", "strict", rb"\u2192 " + b"\xe9" + rb" \U0001f600"),
        ("ascii", "surrogateescape", rb"\u2192 \xe9 \U0001f600"),  # the C locale, before Python 3.7's UTF-8
        ("cp437", "strict", rb"\u2192 " + b"\x82" + rb" \U0001f600"),
        ("utf-8", "strict", "\u2192 \u00e9 \U0001f600".encode()),
        ("ascii", "replace", b"? ? ?"),  # somebody's choice
        ("ascii", "xmlcharrefreplace", b"&#8594; &#233; &#128512;"),
    ],
)
def test_what_an_encoding_lacks_is_written_as_its_escape(
    encoding: str, errors: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors=errors))
    spare_no_text()
    write_out("\u2192 \u00e9 \U0001f600")
    note("\u2192 \u00e9 \U0001f600")
    assert streams["stdout"].getvalue() == written
    assert streams["stderr"].getvalue() == written + b"\n"


def test_half_a_character_in_a_path_is_written_as_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="utf-8"))
    spare_no_text()
    write_out("caf\udce9")
    assert stream.getvalue() == rb"caf\udce9"


def test_tables_are_drawn_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="cp1252"))
    print_out(Text("\u2588\u2588\u00b7"))
    assert stream.getvalue() == b"##.\n"


def test_streams_that_are_not_there_are_an_error_or_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    spare_no_text()
    note("text")
    with pytest.raises(LocalError, match="standard output is closed; send it to a file"):
        write_out("text")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_nothing_is_opened_in_place_of_a_stream_that_is_closed(closed: str, tmp_path: Path) -> None:
    """Else what a library writes to standard error is written into the next file that is opened."""
    (tmp_path / "kept").write_bytes(b"kept")
    script = (
        "import os; from p2pinfer.cli.output.terminal import occupy_streams; occupy_streams();"
        "os.open('kept', os.O_RDWR); [os.write(fd, b'lost') for fd in (1, 2)]"
    )
    command = f'exec "{sys.executable}" -c "{script}" {closed}'
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert (tmp_path / "kept").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("redirection", "exit_code", "complaint"),
    [
        (">/dev/full", 1, "p2pinfer: standard output cannot be written: No space left on device\n"),
        (">&-", 1, "p2pinfer: standard output is closed; send it to a file, or to /dev/null\n"),
        ("2>&-", 0, ""),
    ],
)
@pytest.mark.parametrize(
    "argv", ["--help", "generate --help", "reputation ban --help", "--version", "completion zsh"]
)
def test_help_ends_like_any_other_output(argv: str, redirection: str, exit_code: int, complaint: str) -> None:
    command = f'exec "{sys.executable}" -m p2pinfer {argv} {redirection}'
    ended = subprocess.run(["sh", "-c", command], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (exit_code, complaint)


def test_help_for_a_reader_that_has_gone_ends_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "p2pinfer", "generate", "--help"], stdout=closed_pipe(), stderr=subprocess.PIPE
    )
    _, said = process.communicate()
    assert (process.returncode, said) == (141, b"")
