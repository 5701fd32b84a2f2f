"""SHA-256 of local files, computed in parallel and remembered, with a digest of every tensor.

The SHA-256 of a shard is what the world knows it by. It says nothing about what is read from the file an hour
later, and a file's size and times cannot be trusted to: `cp -p`, `rsync -t` and image layers keep them, a
training run writes its next checkpoint over the last. Hashing gigabytes anew at every start and every load
would be sure and slow. So one pass over a file hashes it and, along the way, each tensor by itself, and both
are remembered. Whoever reads a tensor holds it to its digest (`shard.py`), by a hash that is twice as fast; a
tensor that nobody reads may be what it likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from blake3 import blake3

from p2pinfer.errors import CheckpointError
from p2pinfer.models.pieces.shard_header import Stored, read_header
from p2pinfer.models.progress import Progress

from .gguf_file import is_gguf, read_gguf_header
from .parallel import Count, run_counted

_PIECE_BYTES: Final = 1 << 20
_THREADS: Final = 8  # hashlib releases the interpreter's lock; more than a disk can feed gains nothing
_MAX_STREAMED_HEADER: Final = 16 << 20  # of a file that nobody has vouched for yet
_VERSION: Final = 2  # of a note; others are as good as none


@dataclass(frozen=True, slots=True)
class FileHash:
    """Digests of a file and of its tensors at the time it was hashed."""

    sha256: str  # in hex
    tensors: Mapping[str, str]  # by name, `Stored.digest` in hex; none where it is no safetensors file


def hash_files(
    paths: Sequence[Path], *, cache_dir: Path | None = None, progress: Progress | None = None
) -> list[str]:
    """The sha256 in hex of each file, in order. See `hash_shards`."""
    return [hashed.sha256 for hashed in hash_shards(paths, cache_dir=cache_dir, progress=progress)]


def hash_shards(
    paths: Sequence[Path], *, cache_dir: Path | None = None, progress: Progress | None = None
) -> list[FileHash]:
    """The hashes of each file, in order.

    They are remembered in `cache_dir` by the file's path, size, times and inode. A cache that cannot be read
    or written only costs time.

    Raises:
        CheckpointError: A file cannot be read, or is being written.
    """
    try:
        entries = [_Entry(path, cache_dir) for path in paths]
        unknown = [entry for entry in entries if entry.hashed is None]
        if unknown:
            run_counted(
                [entry.compute for entry in unknown],
                label="checking weights",
                total_bytes=sum(entry.size for entry in unknown),
                threads=min(_THREADS, len(unknown)),
                progress=progress,
            )
    except OSError as exc:
        raise CheckpointError(f"{exc.filename} cannot be read: {exc.strerror}") from exc
    return [entry.known() for entry in entries]


def hash_stream(file: BinaryIO, count: Count = lambda n: None) -> FileHash:
    """The hashes of a file that is read once from its beginning, as it comes.

    It has no digests of tensors if it is no safetensors file, or begins with a header of more than 16 MiB.
    """
    try:
        stored = read_header(file, most=_MAX_STREAMED_HEADER)
    except ValueError:
        stored = {}
    return _hash(file, stored, count)


def remember_hash(path: Path, hashed: FileHash, *, cache_dir: Path) -> None:
    """Remember the hashes of a file that this process has written and hashed itself."""
    with contextlib.suppress(OSError):
        entry = _Entry(path, cache_dir)
        entry.hashed = hashed
        entry.remember()


def forget_hash(path: Path, *, cache_dir: Path | None) -> None:
    """Have the file hashed again the next time, for it is not what it was."""
    if cache_dir is not None:
        with contextlib.suppress(OSError):
            _note_of(path.resolve(), cache_dir).unlink()


def _note_of(path: Path, cache_dir: Path) -> Path:
    return cache_dir / "sha256" / f"{blake3(bytes(path)).hexdigest()[:32]}.json"


def _stamp(path: Path, stat: os.stat_result) -> dict[str, object]:
    """Size, times and inode by which a file is recognised. The inode and its time are hard to keep up."""
    return {
        "version": _VERSION,
        "path": str(path),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


class _Entry:
    """A file, and its hashes where those are known."""

    def __init__(self, path: Path, cache_dir: Path | None) -> None:
        self.path = path.resolve()
        stat = self.path.stat()
        self.size = stat.st_size
        self._stamp = _stamp(self.path, stat)
        self._note = cache_dir and _note_of(self.path, cache_dir)
        self.hashed = self._recall()

    def known(self) -> FileHash:
        assert self.hashed is not None
        return self.hashed

    def compute(self, count: Count) -> None:
        with self.path.open("rb", buffering=0) as file:
            before = _stamp(self.path, os.fstat(file.fileno()))
            self.hashed = _hash(file, _tensors_of(file), count)
            if _stamp(self.path, os.fstat(file.fileno())) != before:
                raise CheckpointError(f"{self.path} is being written; start again when it is complete")
        self._stamp = before
        self.remember()

    def remember(self) -> None:
        if self._note is None:
            return
        hashed = self.known()
        note = {**self._stamp, "sha256": hashed.sha256, "tensors": dict(hashed.tensors)}
        with contextlib.suppress(OSError):  # a read-only cache is no reason to stop
            self._note.parent.mkdir(parents=True, exist_ok=True)
            draft = self._note.with_suffix(f".{os.getpid()}")
            try:
                draft.write_text(json.dumps(note), encoding="ascii")
                draft.replace(self._note)
            finally:
                draft.unlink(missing_ok=True)

    def _recall(self) -> FileHash | None:
        if self._note is None:
            return None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            note: Any = json.loads(self._note.read_bytes())
            if isinstance(note, dict):
                return self._parse(cast("dict[str, Any]", note))
        return None

    def _parse(self, note: dict[str, Any]) -> FileHash | None:
        sha256, tensors = note.pop("sha256", None), note.pop("tensors", None)
        if note != self._stamp or not isinstance(sha256, str) or not isinstance(tensors, dict):
            return None
        digests = cast("dict[str, Any]", tensors)
        if not all(isinstance(digest, str) for digest in digests.values()):
            return None
        return FileHash(sha256, digests)


def _tensors_of(file: BinaryIO) -> Mapping[str, Stored]:
    try:
        return read_gguf_header(file).tensors if is_gguf(file) else read_header(file)
    except (ValueError, CheckpointError):
        return {}  # it is not for us to say what is wrong with it: a hash is of any file


def _hash(file: BinaryIO, stored: Mapping[str, Stored], count: Count) -> FileHash:
    """Both kinds of hashes, from reading the file once."""
    whole = hashlib.sha256()
    tensors: dict[str, str] = {}
    file.seek(0)
    for name, tensor in stored.items():
        _feed(file, tensor.start - file.tell(), [whole.update], count)  # the header, or what aligns tensors
        digest = tensor.digest()
        _feed(file, tensor.nbytes, [whole.update, digest.update], count)
        tensors[name] = digest.hexdigest()
    _feed(file, None, [whole.update], count)
    return FileHash(whole.hexdigest(), tensors)


def _feed(
    file: BinaryIO, size: int | None, takers: Sequence[Callable[[bytes], object]], count: Count
) -> None:
    """Give the file's next `size` bytes, or all that are left, to each taker."""
    while size is None or size > 0:
        piece = file.read(_PIECE_BYTES if size is None else min(size, _PIECE_BYTES))
        if not piece:
            return
        for take in takers:
            take(piece)
        if size is not None:
            size -= len(piece)
        count(len(piece))
