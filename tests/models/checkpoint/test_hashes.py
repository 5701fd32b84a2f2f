from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy

from p2pinfer.errors import CheckpointError
from p2pinfer.models.checkpoint.hashes import forget_hash, hash_files, hash_shards


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


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_hashed_again(
    files: list[Path], tmp_path: Path, keep_times: bool
) -> None:
    """As `cp -p`, `rsync -t` and tar do it, in place or by another file."""
    hash_files(files, cache_dir=tmp_path)
    before = files[1].stat()
    if keep_times:
        files[1].write_bytes(b"two")
    else:
        (tmp_path / "other").write_bytes(b"two")
        (tmp_path / "other").replace(files[1])
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    after = files[1].stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert hash_files(files, cache_dir=tmp_path)[1] == hashlib.sha256(b"two").hexdigest()


DAMAGES: list[Callable[[dict[str, Any]], object]] = [
    lambda _: "",
    lambda _: {},
    lambda _: [],
    lambda _: "{",
    lambda _: "[" * 100_000,
    lambda note: {**note, "version": 1},  # of another version of this program
    lambda note: {**note, "version": 99},
    lambda note: {key: value for key, value in note.items() if key != "version"},
    lambda note: {**note, "sha256": None},
    lambda note: {**note, "tensors": ["x"]},
    lambda note: {**note, "tensors": {"x": 7}},
    lambda note: {**note, "path": "/elsewhere"},
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_only_costs_time(
    files: list[Path], tmp_path: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    hashes = hash_files(files, cache_dir=tmp_path / "cache")
    for path in (tmp_path / "cache" / "sha256").iterdir():
        damaged = damage(json.loads(path.read_text()))
        path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    bar = Bar()
    assert hash_files(files, cache_dir=tmp_path / "cache", progress=bar) == hashes
    assert bar.total > 0
    assert hash_files(files, cache_dir=tmp_path / "cache", progress=(again := Bar())) == hashes
    assert again.total == 0


def test_a_hash_that_is_forgotten_is_computed_again(files: list[Path], tmp_path: Path) -> None:
    hashes = hash_files(files, cache_dir=tmp_path / "cache")
    forget_hash(files[1], cache_dir=tmp_path / "cache")
    forget_hash(files[1], cache_dir=tmp_path / "cache")
    forget_hash(files[1], cache_dir=None)
    bar = Bar()
    assert hash_files(files, cache_dir=tmp_path / "cache", progress=bar) == hashes
    assert bar.total == 3


def test_a_file_that_is_written_while_it_is_hashed_is_refused(files: list[Path], tmp_path: Path) -> None:
    class Writer(Bar):
        def advance(self, n: int) -> None:
            with files[2].open("r+b") as file:
                file.write(b"x" * self.done_bytes)
            super().advance(n + 1)

    big = files[2]
    big.write_bytes(bytes(64 << 20))
    with pytest.raises(CheckpointError, match="is being written; start again when it is complete"):
        hash_files([big], cache_dir=tmp_path / "cache", progress=Writer())
    assert list((tmp_path / "cache").glob("**/*.json")) == []


def test_a_tensor_has_a_digest_of_what_it_is_and_where_it_lies_does_not_matter(tmp_path: Path) -> None:
    safetensors_numpy: Any = safetensors.numpy
    save = safetensors_numpy.save_file
    one, two = numpy.arange(6, dtype=numpy.float32), numpy.ones((2, 3), dtype=numpy.float32)
    save({"a": one, "b": two}, tmp_path / "1.safetensors")
    save({"0": two, "a": one, "b": two}, tmp_path / "2.safetensors")
    save({"a": one.reshape(2, 3), "b": two.view(numpy.int32)}, tmp_path / "3.safetensors")
    first, second, third = hash_shards([tmp_path / f"{n}.safetensors" for n in (1, 2, 3)])
    assert first.sha256 == hashlib.sha256((tmp_path / "1.safetensors").read_bytes()).hexdigest()
    assert first.tensors.keys() == {"a", "b"}
    assert [second.tensors[name] for name in "ab"] == [first.tensors[name] for name in "ab"]
    assert not set(third.tensors.values()) & set(first.tensors.values())


def test_a_cache_that_cannot_be_written_is_done_without(files: list[Path]) -> None:
    assert hash_files(files, cache_dir=files[0]) == hash_files(files)


def test_an_unreadable_file_is_named_and_ends_the_progress(files: list[Path], tmp_path: Path) -> None:
    bar = Bar()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        hash_files([files[0], tmp_path], progress=bar)
    assert bar.ended == 1
    with pytest.raises(CheckpointError, match="nothing cannot be read: No such file"):
        hash_files([tmp_path / "nothing"])
