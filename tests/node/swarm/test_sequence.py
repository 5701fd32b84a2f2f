"""The numbers of a node's announcements: kept on disk, learnt from neighbours, and no clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pinfer.node.swarm.sequence import FILE_NAME, MAX_SEQUENCE, RESERVED, Sequence

DAY_S = 86400.0


def at(seconds: float, data_dir: Path | None) -> Sequence:
    return Sequence(data_dir, lambda: seconds)


@pytest.mark.parametrize("back_s", [770.0, DAY_S, 20_000 * DAY_S])
def test_a_clock_that_was_set_back_before_a_restart_does_no_harm(tmp_path: Path, back_s: float) -> None:
    before = at(20_000 * DAY_S, tmp_path)
    said = [before.next() for _ in range(5)]
    after = at(20_000 * DAY_S - back_s, tmp_path)
    assert after.next() > said[-1]
    assert sorted(said) == said


async def test_a_node_that_was_killed_comes_back_above_all_it_announced(tmp_path: Path) -> None:
    last = 0
    for announcements in (1, RESERVED // 2 + 1, 2 * RESERVED):
        killed = at(0.0, tmp_path)  # nothing is written when it ends
        for _ in range(announcements):
            await killed.keep_reserved()
            last = killed.next()
        assert at(0.0, tmp_path).next() > last


def test_a_clock_that_is_right_helps_where_the_file_is_lost(tmp_path: Path) -> None:
    last = at(20_000 * DAY_S, tmp_path).next()
    (tmp_path / FILE_NAME).unlink()
    assert at(20_000 * DAY_S + 1, tmp_path).next() > last


@pytest.mark.parametrize("content", [b"", b"-5", b"nonsense", b"9" * 80, b"\xff\xfe", b"1.5"])
def test_a_damaged_file_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    number = at(5.0, tmp_path).next()
    assert 5000 < number <= MAX_SEQUENCE


def test_a_neighbour_s_memory_is_gone_beyond(tmp_path: Path) -> None:
    restored = at(1.0, tmp_path)
    leaps: list[int] = []
    restored.when_overtaken(lambda: leaps.append(restored.last))
    restored.overtaken(50_000)
    assert restored.next() == 50_001
    restored.overtaken(50_001)  # our own, come back
    restored.overtaken(7)
    restored.overtaken(MAX_SEQUENCE)  # nothing could follow it
    assert restored.next() == 50_002
    assert leaps == [50_000]


def test_a_passing_identity_keeps_nothing(tmp_path: Path) -> None:
    assert at(1.0, None).next() == 1001
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    numbers = at(1.0, tmp_path / "file" / "below")
    assert numbers.next() < numbers.next()
    assert "cannot save the number of this node's last announcement" in caplog.text
