"""A data directory serves one node at a time, and says whom."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from p2pinfer.errors import DataDirInUse
from p2pinfer.node.data_lock import HOLDER_FILE, LOCK_FILE, hold_data_dir, read_holder

HOLDING = """
import sys, time
from pathlib import Path
from p2pinfer.node.data_lock import hold_data_dir
with hold_data_dir(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def other_process(data_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_node_hears_who_is_there_already(tmp_path: Path) -> None:
    first = other_process(tmp_path)
    try:
        with pytest.raises(DataDirInUse) as refused, hold_data_dir(tmp_path):
            pass
        said = str(refused.value)
        assert str(tmp_path) in said
        assert f"process {first.pid} since 20" in said
        assert f"-c {tmp_path}" in said
        assert "--data-dir" in said
    finally:
        first.communicate("")
    with hold_data_dir(tmp_path):
        assert read_holder(tmp_path) is not None
    assert read_holder(tmp_path) is None


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_who_was_killed_holds_nothing(tmp_path: Path) -> None:
    first = other_process(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / HOLDER_FILE).exists()
    assert read_holder(tmp_path) is None
    with hold_data_dir(tmp_path):
        holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.pid == os.getpid()


def test_two_directories_are_two_nodes(tmp_path: Path) -> None:
    with hold_data_dir(tmp_path / "one"), hold_data_dir(tmp_path / "two"):
        assert (tmp_path / "one" / LOCK_FILE).exists()


def test_one_directory_under_two_names_is_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with hold_data_dir(tmp_path / "one"), pytest.raises(DataDirInUse), hold_data_dir(tmp_path / "two"):
        pass


def test_who_fails_lets_go(tmp_path: Path) -> None:
    with suppress(ValueError), hold_data_dir(tmp_path):
        raise ValueError("no model")
    with hold_data_dir(tmp_path):
        pass


@pytest.mark.parametrize("noted", ["", "{", "[]", '{"pid": "x"}', '{"pid": -1, "host": "h"}'])
def test_a_damaged_note_of_the_holder_says_nothing(tmp_path: Path, noted: str) -> None:
    first = other_process(tmp_path)
    try:
        (tmp_path / HOLDER_FILE).write_text(noted)
        with pytest.raises(DataDirInUse, match="an unknown process"), hold_data_dir(tmp_path):
            pass
    finally:
        first.communicate("")


def test_a_holder_on_another_computer_is_named_with_it(tmp_path: Path) -> None:
    first = other_process(tmp_path)
    try:
        note = (tmp_path / HOLDER_FILE).read_text().replace(socket.gethostname(), "attic")
        (tmp_path / HOLDER_FILE).write_text(note)
        with pytest.raises(DataDirInUse, match=f"process {first.pid} on attic"), hold_data_dir(tmp_path):
            pass
    finally:
        first.communicate("")


def test_a_directory_that_cannot_be_written_is_used_without(tmp_path: Path) -> None:
    """What it means for the identity is for others to say."""
    (tmp_path / "file").touch()
    with hold_data_dir(tmp_path / "file" / "folder"):
        assert (tmp_path / "file").read_bytes() == b""
