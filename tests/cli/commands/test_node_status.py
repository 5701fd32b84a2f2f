"""`p2pinfer node status`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import trio

from p2pinfer.cli.app import run
from p2pinfer.cli.commands import node_status
from p2pinfer.cli.commands.node_status import (
    FILE,
    DayTotals,
    NodeStatus,
    StatusBoard,
    describe,
    read_status,
    written_status,
)
from p2pinfer.node.data_lock import hold_data_dir
from p2pinfer.node.events import (
    Loading,
    NodeLeaving,
    Reached,
    Ready,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    Starting,
    Stopped,
    Verified,
)

NOON = time.mktime((2026, 1, 31, 12, 0, 0, 0, 0, -1))
DAY_S = 86_400.0
BEGUN = Starting("12D3KooWme", ("/ip4/192.0.2.7/tcp/1",), "tiny-stories", "ab" * 16)
READY = Ready("12D3KooWme", (), "tiny-stories", "ab" * 16, (0, 4), "float32", "cpu", 10.0, 100)


def test_a_day_adds_up_over_restarts_and_ends_at_midnight() -> None:
    now = NOON
    board = StatusBoard(None, lambda: now)
    for event in (
        BEGUN,
        Loading((0, 4), "asked for"),
        READY,
        SessionOpened("c", (0, 4), 100, 1),
        SessionClosed("c", 30, "closed", 0),
        SessionRefused("c", "busy", "full"),
        Verified(3, 3, 0, 0),
        Reached("public", "none", ("/ip4/192.0.2.7/tcp/1",), (), "others can dial it"),
    ):
        board.note(event)
    assert board.status.today == DayTotals("2026-01-31", sessions=1, tokens=30, refused=1, audits=3)
    assert (board.status.state, board.status.blocks, board.status.sessions) == ("serving", (0, 4), 0)
    board.note(Stopped(1.0, 1, 30, 1, 0, 0, 0, 0))
    again = StatusBoard(board.status, lambda: now)
    assert again.status.state == "starting"
    again.note(SessionClosed("c", 12, "closed", 0))
    assert again.status.today.tokens == 42
    now = NOON + DAY_S
    again.note(SessionClosed("c", 5, "closed", 0))
    assert again.status.today == DayTotals("2026-02-01", tokens=5)
    assert StatusBoard(board.status, lambda: NOON + DAY_S).status.today == DayTotals("2026-02-01")


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written at once, and to the end, however busy the machine is; a mocked clock waits for no disk."""
    monkeypatch.setattr(node_status, "EVERY_S", 0.01)
    monkeypatch.setattr(node_status, "LAST_WRITE_S", 60.0)


async def test_a_node_writes_down_what_it_does(tmp_path: Path) -> None:
    async with written_status(tmp_path) as note:
        note(BEGUN)
        note(READY)
        while (found := read_status(tmp_path)) is None:
            await trio.sleep(0.01)
        assert (found.state, found.peer_id) == ("serving", "12D3KooWme")
        note(NodeLeaving(0))
        note(Stopped(1.0, 0, 0, 0, 0, 0, 0, 0))
    assert (found := read_status(tmp_path)) is not None
    assert found.state == "stopped"


async def test_a_node_that_is_turned_away_leaves_the_status_of_the_one_that_runs(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"untouched")
    with pytest.raises(RuntimeError, match="in use"):
        async with written_status(tmp_path):
            raise RuntimeError("in use")
    assert (tmp_path / FILE).read_bytes() == b"untouched"
    assert read_status(tmp_path) is None


def test_status_tells_a_node_that_runs_from_one_that_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["node", "status", "--data-dir", str(tmp_path)]
    assert run(argv) == 1
    assert "no node has run" in capsys.readouterr().err
    board = StatusBoard(None, name="Anna's attic")
    for event in (BEGUN, READY, SessionOpened("c", (0, 4), 100, 1)):
        board.note(event)
    with hold_data_dir(tmp_path):
        (tmp_path / FILE).write_bytes(board.encoded())
        assert run(argv) == 0
        said = capsys.readouterr().out
        assert "12D3KooWme, Anna's attic" in said
        assert "serving, for 0 min" in said
        assert "tiny-stories, blocks 0:4" in said
        assert "1 sessions, 0 tokens" in said
        assert run([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["sessions"] == 1
    assert run(argv) == 1
    assert "stopped" in capsys.readouterr().out


def test_a_node_without_blocks_says_so() -> None:
    status = NodeStatus(DayTotals("2026-01-31"), NOON, NOON, "12D3KooWme", state="introducing")
    assert "no blocks: it introduces peers" in describe(status, NOON + 3 * DAY_S)
    assert "for 3 days" in describe(status, NOON + 3 * DAY_S)
