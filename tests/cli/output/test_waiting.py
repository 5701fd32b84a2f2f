"""A word on what is being waited for, in time and out of the way."""

from __future__ import annotations

import io
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pinfer.cli.output.terminal import note, write_out
from p2pinfer.cli.output.waiting import WaitingLine

NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHRDh3yL8gix9dCiwmrLZahcKY8Ae7ovYj3Tb1iAg6gpz"


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard output and error on one terminal. No fixture: pytest sets both anew before a test's body."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    return terminal


def test_off_a_terminal_each_wait_is_a_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    with WaitingLine(patience_s=0.0) as waiting:
        for what in ("tea", "cake"):
            waiting.say(what)
            until(lambda: waiting.is_said)
            waiting.erase()
        time.sleep(0.15)  # no more is said of it, however long it takes
    assert capsys.readouterr().err == "tea ...\ncake ...\n"


def test_what_is_quick_is_not_worth_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with WaitingLine(patience_s=3600.0) as waiting:
        waiting.say("tea")
        time.sleep(0.15)  # it has been looked at
    assert capsys.readouterr().err == ""


def test_what_is_known_to_take_long_is_said_at_once_and_nothing_where_quiet_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with WaitingLine() as waiting:
        waiting.say("tea", at_once=True)
    with WaitingLine(quiet=True) as waiting:
        waiting.say("cake", at_once=True)
    assert capsys.readouterr().err == "tea ...\n"


def test_a_wait_that_becomes_another_is_said_anew(capsys: pytest.CaptureFixture[str]) -> None:
    now = ["tea"]
    with WaitingLine(patience_s=0.0) as waiting:
        waiting.say(lambda: now[0])
        until(lambda: waiting.is_said)
        now[0] = "cake"
        until(lambda: waiting.is_said and waiting.text == "cake")
    assert capsys.readouterr().err == "tea ...\ncake ...\n"


def test_on_a_terminal_the_line_is_gone_before_anything_else_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_a_terminal(monkeypatch)
    with WaitingLine(patience_s=0.0) as waiting:
        for word, write in (("one", note), ("two", write_out)):
            waiting.say("tea")
            until(lambda: terminal.getvalue().endswith("tea ..."))
            write(word)
            assert f"tea ...\r\x1b[K{word}" in terminal.getvalue()  # by now it may be there again
            waiting.pause()
        waiting.say("cake")
        until(lambda: terminal.getvalue().endswith("cake ..."))
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_line_is_no_longer_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "20")
    with WaitingLine() as waiting:
        waiting.say("tea " * 20, at_once=True)
        assert len(terminal.getvalue().removeprefix("\r\x1b[K")) == 19


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["--json", "--seed=1"])
def test_a_process_says_a_word_before_it_imports_what_takes_long(stdout: str, tmp_path: Path) -> None:
    """Of a pipe, in the order in which it comes: loading, then looking, then why it did not work."""
    ended = subprocess.run(
        [sys.executable, "-m", "p2pinfer", "generate", stdout, "--bootstrap", NOBODY, "Once"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    waits = [line for line in ended.stderr.splitlines() if line.endswith(" ...")]
    assert ended.returncode == 1
    assert waits[0] == "loading torch and libp2p ..."
    assert waits[-1] == "looking for peers ..."
    assert "..." not in ended.stdout


@pytest.mark.slow
def test_on_a_terminal_a_word_is_there_while_torch_is_imported(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "p2pinfer", "generate", "--bootstrap", NOBODY, "Once"]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment
    )
    os.close(theirs)
    said = b""
    while b"loading" not in said:
        assert select.select([ours], [], [], 30)[0]
        said += os.read(ours, 4096)
    process.terminate()
    process.wait()
    os.close(ours)
