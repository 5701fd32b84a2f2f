"""Bars and spinners where somebody watches, a line or nothing elsewhere."""

from __future__ import annotations

import pytest

from p2pinfer.cli.output.progress import Bars, NodesStarting

SHOW_CURSOR = "\x1b[?25h"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error looks like a terminal to rich."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_a_bar_and_clears_it_away(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars.start("fetching", 1000)
    bars.advance(400)
    bars.start("loading", 0)
    bars.advance(600)
    bars.done()
    bars.done()
    bars.advance(1)
    said = capsys.readouterr()
    assert said.out == ""
    assert "fetching" in said.err
    assert "loading" in said.err


def test_elsewhere_only_long_work_is_worth_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars()
    bars.start("hashing", 1 << 20)
    bars.advance(1 << 20)
    bars.done()
    bars.start("fetching", 3 << 30)
    bars.done()
    assert capsys.readouterr().err == "fetching (3,072 MiB)\n"


@pytest.mark.usefixtures("terminal")
def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars(quiet=True)
    bars.start("fetching", 3 << 30)
    bars.advance(5)
    bars.done()
    with NodesStarting(quiet=True) as starting:
        starting(0, 3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("terminal")
def test_a_terminal_counts_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    with NodesStarting() as starting:
        for ready in range(4):
            starting(ready, 3)
    assert "starting 3 nodes on this computer, 3 ready" in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_nothing_spins_on_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), NodesStarting() as starting:
        starting(0, 3)
        raise ZeroDivisionError
    assert SHOW_CURSOR in capsys.readouterr().err


def test_elsewhere_it_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with NodesStarting() as starting:
        for ready in range(4):
            starting(ready, 3)
    assert capsys.readouterr().err == "no swarm in reach: starting 3 nodes on this computer\n"
