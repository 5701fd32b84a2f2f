"""Trainings that `p2pinfer tune` notes for a page."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from pathlib import Path

import pytest
import trio

from p2pinfer.web import trainings
from p2pinfer.web.trainings import FOLDER, KEPT_S, MOST, POINTS, noted_training, read_trainings, thinned


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written at once, and to the end, however busy the machine is; a mocked clock waits for no disk."""
    monkeypatch.setattr(trainings, "EVERY_S", 0.0)
    monkeypatch.setattr(trainings, "LAST_WRITE_S", 60.0)


async def test_a_page_sees_each_state_of_a_training(tmp_path: Path) -> None:
    async with noted_training(tmp_path, "stories", "tiny-stories") as board:
        await noted(tmp_path)
        (begun,) = read_trainings(tmp_path)
        assert (begun.state, begun.step, begun.loss, begun.losses) == ("running", 0, None, ())
        board.show(2, 3, [3.0, 2.5], 100.0, 4.0)
        await changed(tmp_path, 2)
        (running,) = read_trainings(tmp_path)
        assert (running.name, running.model, running.state) == ("stories", "tiny-stories", "running")
        assert (running.step, running.steps, running.loss, running.left_s) == (2, 3, 2.5, 4.0)
        assert running.losses == ((1.0, 3.0), (2.0, 2.5))
        board.show(3, 3, [3.0, 2.5, 2.0], 100.0, 0.0)
    (done,) = read_trainings(tmp_path)
    assert (done.state, done.step, done.losses[-1]) == ("done", 3, (3.0, 2.0))


async def noted(data_dir: Path) -> None:
    """Wait until something is there to be read."""
    while not read_trainings(data_dir):
        await trio.sleep(0.01)


async def changed(data_dir: Path, step: int) -> None:
    while read_trainings(data_dir)[0].step != step:
        await trio.sleep(0.01)


async def test_a_training_that_breaks_off_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no route"):
        async with noted_training(tmp_path, "stories", "tiny-stories") as board:
            board.show(1, 3, [3.0], 100.0, 4.0)
            raise RuntimeError("no route")
    assert read_trainings(tmp_path)[0].state == "interrupted"


async def test_a_cancelled_training_says_so(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with noted_training(tmp_path, "stories", "tiny-stories") as board:
            board.show(1, 3, [3.0], 100.0, 4.0)
            scope.cancel()
            await trio.sleep_forever()
    (told,) = read_trainings(tmp_path)
    assert (told.state, told.step) == ("interrupted", 1)


async def test_a_training_whose_process_was_killed_is_no_longer_running(tmp_path: Path) -> None:
    async with noted_training(tmp_path, "stories", "tiny-stories"):
        await noted(tmp_path)
        (path,) = (tmp_path / FOLDER).iterdir()
        note = json.loads(path.read_bytes())
    assert note["pid"] == os.getpid()
    note["training"]["state"] = "running"
    path.write_text(json.dumps(note))
    assert read_trainings(tmp_path)[0].state == "running"
    path.write_text(json.dumps({**note, "began": note["began"] - 1000}))  # another process of that number
    assert read_trainings(tmp_path)[0].state == "interrupted"


async def test_old_ones_are_forgotten_and_strange_files_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    for number in range(MOST + 3):
        async with noted_training(tmp_path, f"run {number}", "tiny-stories"):
            pass
    assert len(read_trainings(tmp_path)) == MOST
    for path in folder.iterdir():
        os.utime(path, (0, path.stat().st_mtime - KEPT_S - 60))
    (folder / "broken.json").write_text("{")
    (folder / "large.json").write_bytes(b" " * (1 << 17))
    async with noted_training(tmp_path, "last", "tiny-stories"):
        pass
    assert [each.name for each in read_trainings(tmp_path)] == ["last"]
    assert len(list(folder.iterdir())) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
async def test_nobody_else_reads_them(tmp_path: Path) -> None:
    async with noted_training(tmp_path, "stories", "tiny-stories"):
        pass
    (path,) = (tmp_path / FOLDER).iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_disk_that_takes_nothing_does_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(trainings, "write_private", refuse)
    async with noted_training(tmp_path, "stories", "tiny-stories") as board:
        board.show(1, 3, [3.0], 100.0, 4.0)
    assert "no space left" in caplog.text
    assert read_trainings(tmp_path) == ()


def test_a_long_curve_is_thinned_to_means() -> None:
    losses = [float(step) for step in range(1, 10 * POINTS + 1)]
    curve = thinned(losses)
    assert len(curve) == POINTS
    assert curve[0] == (5.5, 5.5)
    assert curve[-1][1] == pytest.approx(10 * POINTS - 4.5)
    assert thinned([math.nan, math.inf, 2.0]) == ((3.0, 2.0),)
