"""SHA-256 of local files, in parallel, remembered between runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from blake3 import blake3

from p2pinfer.errors import CheckpointError

from .parallel import Count, run_counted
from .progress import Progress

_PIECE_BYTES = 1 << 20
_THREADS = 8  # hashlib releases the interpreter's lock; more than a disk can feed gains nothing


def hash_files(
    paths: Sequence[Path], *, cache_dir: Path | None = None, progress: Progress | None = None
) -> list[str]:
    """The sha256 in hex of each file, in order.

    A hash is remembered in `cache_dir` by the file's path, size and mtime_ns. A cache that cannot be read
    or written only costs time.

    Raises:
        CheckpointError: A file cannot be read.
    """
    try:
        entries = [_Entry(path, cache_dir) for path in paths]
        unknown = [entry for entry in entries if entry.sha256 is None]
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
    return [entry.sha256 or "" for entry in entries]


def note_hash(path: Path, sha256: str, *, cache_dir: Path) -> None:
    """Remember the hash of a file that was hashed while it was written."""
    _Entry(path, cache_dir).remember(sha256)


class _Entry:
    """A file, and its hash where that is known."""

    def __init__(self, path: Path, cache_dir: Path | None) -> None:
        self.path = path.resolve()
        stat = self.path.stat()
        self.size = stat.st_size
        self._stamp = {"path": str(self.path), "size": self.size, "mtime_ns": stat.st_mtime_ns}
        self._note = cache_dir and cache_dir / "sha256" / f"{blake3(bytes(self.path)).hexdigest()[:32]}.json"
        self.sha256 = self._recall()

    def compute(self, count: Count) -> None:
        digest = hashlib.sha256()
        with self.path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                count(len(piece))
        self.remember(digest.hexdigest())

    def remember(self, sha256: str) -> None:
        self.sha256 = sha256
        if self._note is None:
            return
        with contextlib.suppress(OSError):  # a read-only cache is no reason to stop
            self._note.parent.mkdir(parents=True, exist_ok=True)
            draft = self._note.with_suffix(f".{os.getpid()}")
            try:
                draft.write_text(json.dumps({**self._stamp, "sha256": sha256}))
                draft.replace(self._note)
            finally:
                draft.unlink(missing_ok=True)

    def _recall(self) -> str | None:
        if self._note is None:
            return None
        with contextlib.suppress(OSError, ValueError, KeyError):
            note: Any = json.loads(self._note.read_bytes())
            if isinstance(note, dict):
                known = cast("dict[str, Any]", note)
                sha256 = str(known.pop("sha256"))
                return sha256 if known == self._stamp else None
        return None
