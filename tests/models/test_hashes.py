from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from p2pinfer.errors import CheckpointError
from p2pinfer.models.hashes import hash_files


class Bar:
    """A progress bar that only counts."""

    def __init__(self) -> None:
        self.total, self.done_bytes, self.ended = 0, 0, 0

    def start(self, label: str, total_bytes: int) -> None:
        self.total += total_bytes

    def advance(self, n: int) -> None:
        self.done_bytes += n

    def done(self) -> None:
        self.ended += 1


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    contents = [b"", b"one", bytes(3 << 20)]
    paths = [tmp_path / f"{i}.bin" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_the_hashes_are_sha256_in_order(files: list[Path]) -> None:
    assert hash_files(files) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def test_a_hash_is_computed_once_and_then_remembered(files: list[Path], tmp_path: Path) -> None:
    first, second = Bar(), Bar()
    hashes = hash_files(files, cache_dir=tmp_path / "cache", progress=first)
    assert hash_files(files, cache_dir=tmp_path / "cache", progress=second) == hashes
    assert (first.total, first.done_bytes, first.ended) == (3 + (3 << 20), 3 + (3 << 20), 1)
    assert (second.total, second.ended) == (0, 0)


def test_a_changed_file_is_hashed_again(files: list[Path], tmp_path: Path) -> None:
    hash_files(files, cache_dir=tmp_path)
    stat = files[1].stat()
    files[1].write_bytes(b"two")
    os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert hash_files(files, cache_dir=tmp_path)[1] == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("note", ["", "{}", "[]", "{"])
def test_a_damaged_note_only_costs_time(files: list[Path], tmp_path: Path, note: str) -> None:
    hashes = hash_files(files, cache_dir=tmp_path / "cache")
    for path in (tmp_path / "cache" / "sha256").iterdir():
        path.write_text(note)
    assert hash_files(files, cache_dir=tmp_path / "cache") == hashes


def test_a_cache_that_cannot_be_written_is_done_without(files: list[Path]) -> None:
    assert hash_files(files, cache_dir=files[0]) == hash_files(files)


def test_an_unreadable_file_is_named_and_ends_the_progress(files: list[Path], tmp_path: Path) -> None:
    bar = Bar()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        hash_files([files[0], tmp_path], progress=bar)
    assert bar.ended == 1
    with pytest.raises(CheckpointError, match="nothing cannot be read: No such file"):
        hash_files([tmp_path / "nothing"])
