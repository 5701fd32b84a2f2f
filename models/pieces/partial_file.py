"""File that comes in chunks, in any order, and goes on where an earlier run ended."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

from p2pinfer.errors import CheckpointError

from .chunks import CHUNK_BYTES, ChunkList

SUFFIX: Final = ".chunks"  # of what has come of a file; a download of the hub's has `.part`


class NotHere(Exception):
    """The rest of a file will not come."""


class PartialFile:
    """The chunks of one file that have come. Used by one thread at a time, but for `write`.

    What an earlier run left is not trusted: each chunk that hashes to what the list says is here, and any
    other is not. That takes a second for five gigabytes, and asks for no second file that could be wrong.
    """

    def __init__(self, path: Path, chunks: ChunkList) -> None:
        """The file that shall be `path`; nothing is read or made yet."""
        self.path = path
        self.chunks = chunks
        self._draft = path.with_name(path.name + SUFFIX)
        self._descriptor = -1
        self._closed = True
        self._users = 0  # threads that read or write at the moment
        self._came = threading.Condition()
        self._here = bytearray(len(chunks))  # 1 for each chunk that is here

    def open(self) -> set[int]:
        """Begin, or go on; returns the chunks that are missing.

        Raises:
            CheckpointError: The disk refuses.
        """
        try:
            self._draft.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._draft, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
            self._closed = False
            there = os.fstat(self._descriptor).st_size
            if there > self.chunks.size:
                os.ftruncate(self._descriptor, self.chunks.size)
            missing = {index for index in range(len(self.chunks)) if not self._has(index, there)}
        except OSError as exc:
            raise CheckpointError(f"{self._draft} cannot be written: {exc.strerror}") from exc
        for index in range(len(self.chunks)):
            self._here[index] = index not in missing
        return missing

    def follow(self) -> BinaryIO:
        """The file as it comes, to be read once from its beginning: a read waits for what is missing.

        A read raises `NotHere` once the file is closed and the rest will not come.
        """
        return cast(BinaryIO, _Following(self))

    def read_when_here(self, start: int, size: int) -> bytes:
        """At most `size` bytes of one chunk, from `start` on, once that has come.

        Raises:
            NotHere: It will not come.
        """
        index = start // CHUNK_BYTES
        if index >= len(self.chunks):
            return b""
        with self._came:
            while not (self._here[index] or self._closed):
                self._came.wait()
        size = min(size, self.chunks.start(index) + self.chunks.bytes_of(index) - start)
        return self._read(start, size)

    def write(self, index: int, content: bytes | bytearray | memoryview) -> None:
        """Put a chunk, which was checked, in its place. Any thread may.

        Raises:
            NotHere: The file is closed.
            CheckpointError: The disk refuses.
        """
        start = self.chunks.start(index)
        try:
            with self._in_use() as descriptor, memoryview(content) as view:
                done = 0
                while done < len(view):
                    done += _write_at(descriptor, view[done:], start + done)
        except OSError as exc:
            raise CheckpointError(
                f"{self._draft} cannot be written: {exc.strerror}; make room and start again: "
                "what has come is kept"
            ) from exc
        with self._came:
            self._here[index] = 1
            self._came.notify_all()

    def _has(self, index: int, there: int) -> bool:
        start, size = self.chunks.start(index), self.chunks.bytes_of(index)
        return start + size <= there and self.chunks.has(index, self._read(start, size))

    def _read(self, start: int, size: int) -> bytes:
        with self._in_use() as descriptor:
            return _read_at(descriptor, size, start)

    @contextmanager
    def _in_use(self) -> Generator[int]:
        """The open file. It is not closed meanwhile: its number could be another file's a moment later."""
        with self._came:
            if self._closed:
                raise NotHere(f"{self._draft} is closed")
            self._users += 1
        try:
            yield self._descriptor
        finally:
            with self._came:
                self._users -= 1
                self._came.notify_all()

    def close(self) -> None:
        """Keep what has come; what is written later is refused. Harmless twice."""
        with self._came:
            was_closed, self._closed = self._closed, True
            self._came.notify_all()
            while self._users:
                self._came.wait()
        if not was_closed:
            os.close(self._descriptor)

    @property
    def draft(self) -> Path:
        """File with the chunks, until it is whole."""
        return self._draft

    def finish(self) -> None:
        """Give the whole file its name.

        Raises:
            CheckpointError: The disk refuses.
        """
        self.close()
        try:
            self._draft.replace(self.path)
        except OSError as exc:
            if not self.path.exists():  # or another process was faster
                raise CheckpointError(f"{self.path} cannot be written: {exc.strerror}") from exc

    def discard(self) -> None:
        """Forget what has come."""
        self.close()
        self._draft.unlink(missing_ok=True)


if sys.platform != "win32":
    _read_at, _write_at = os.pread, os.pwrite
else:
    _moving = threading.Lock()  # a place in the file and what is done there are two calls

    def _read_at(descriptor: int, size: int, start: int) -> bytes:
        with _moving:
            os.lseek(descriptor, start, os.SEEK_SET)
            return os.read(descriptor, size)

    def _write_at(descriptor: int, content: memoryview, start: int) -> int:
        with _moving:
            os.lseek(descriptor, start, os.SEEK_SET)
            return os.write(descriptor, content)


class _Following:
    """A file that is read while it comes; enough of one for what hashes it."""

    def __init__(self, file: PartialFile) -> None:
        self._file = file
        self._at = 0

    def read(self, size: int) -> bytes:
        if size >= CHUNK_BYTES:  # who reads pieces takes what there is
            piece = self._file.read_when_here(self._at, size)
            self._at += len(piece)
            return piece
        content = bytearray()
        while len(content) < size and (piece := self._file.read_when_here(self._at, size - len(content))):
            content += piece
            self._at += len(piece)
        return bytes(content)

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.chunks.size}[whence]
        self._at = base + at
        return self._at

    def tell(self) -> int:
        return self._at
