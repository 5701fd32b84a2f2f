"""Weight files in chunks of a mebibyte, so that each can be checked before the next one has come.

Nobody publishes hashes of chunks. A list of them is the word of whoever gives it, until the whole file has
the published SHA-256. Then the list is proved, and so is who contradicted it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

from blake3 import blake3

from p2pinfer.errors import CheckpointError, ModelChanged

CHUNK_BYTES: Final = 1 << 20
DIGEST_BYTES: Final = 32
_CHECK_BYTES: Final = 16
MAX_CHUNKS: Final = 1 << 18  # 256 GiB, whose list has 8 MiB


@dataclass(frozen=True, slots=True)
class ChunkList:
    """Size of a file and the blake3 of each of its chunks, one after the other."""

    size: int
    digests: bytes

    def __len__(self) -> int:
        return len(self.digests) // DIGEST_BYTES

    @property
    def is_whole(self) -> bool:
        """True if there is a digest for each chunk of a file of this size."""
        return self.size > 0 and len(self.digests) == DIGEST_BYTES * -(-self.size // CHUNK_BYTES)

    def start(self, index: int) -> int:
        """Offset of a chunk in the file."""
        return index * CHUNK_BYTES

    def bytes_of(self, index: int) -> int:
        """Bytes of a chunk, of which only the last has fewer than the others."""
        return min(CHUNK_BYTES, self.size - index * CHUNK_BYTES)

    def has(self, index: int, content: bytes | bytearray | memoryview) -> bool:
        """True if that is the chunk's content."""
        at = index * DIGEST_BYTES
        return blake3(content).digest() == self.digests[at : at + DIGEST_BYTES]


def recall_chunks(sha256: str, cache_dir: Path) -> ChunkList | None:
    """The list for a file of this hash, if one was made or proved here."""
    with contextlib.suppress(OSError):
        note = _note_of(sha256, cache_dir).read_bytes()
        content, check = note[:-_CHECK_BYTES], note[-_CHECK_BYTES:]
        found = ChunkList(int.from_bytes(content[:8], "big"), content[8:])
        if found.is_whole and _check_of(content) == check:
            return found
    return None


def remember_chunks(sha256: str, chunks: ChunkList, cache_dir: Path) -> None:
    """Keep the list of a file that has this hash. A cache that cannot be written only costs time."""
    path = _note_of(sha256, cache_dir)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            content = chunks.size.to_bytes(8, "big") + chunks.digests
            draft.write_bytes(content + _check_of(content))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def list_chunks(
    path: Path, sha256: str, cache_dir: Path, count: Callable[[int], None] = lambda n: None
) -> ChunkList:
    """The list for a file, made by reading all of it unless it is remembered.

    Args:
        sha256: What the file has to hash to, in hex.
        count: Told every number of bytes; may raise to stop.

    Raises:
        ModelChanged: It hashes to something else.
        CheckpointError: It cannot be read.
    """
    if (known := recall_chunks(sha256, cache_dir)) is not None:
        return known
    whole, digests, size = hashlib.sha256(), bytearray(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while content := _read(file, CHUNK_BYTES):
                whole.update(content)
                digests += blake3(content).digest()
                size += len(content)
                count(len(content))
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror}") from exc
    if whole.hexdigest() != sha256:
        raise ModelChanged(f"{path} changed after it was hashed; start p2pinfer again when it is complete")
    chunks = ChunkList(size, bytes(digests))
    remember_chunks(sha256, chunks, cache_dir)
    return chunks


class ChunkReader:
    """Reads chunks of one file, each checked, into one buffer. For one thread at a time.

    A folder may be rewritten under a running process, and what a node sends counts as its word.
    """

    def __init__(self, path: Path, chunks: ChunkList) -> None:
        """Raises ModelChanged: The file cannot be read any more."""
        self._path = path
        self._chunks = chunks
        self._buffer = memoryview(bytearray(CHUNK_BYTES))
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as exc:
            raise ModelChanged(f"{path} cannot be read: {exc.strerror}") from exc

    def read(self, index: int) -> memoryview:
        """A chunk; the next one takes its place.

        Raises:
            ModelChanged: It is not what was hashed.
        """
        content, filled = self._buffer[: self._chunks.bytes_of(index)], 0
        try:
            self._file.seek(self._chunks.start(index))
            while filled < len(content) and (count := self._file.readinto(content[filled:])):
                filled += count
        except OSError as exc:
            raise ModelChanged(f"{self._path} cannot be read: {exc.strerror}") from exc
        if filled < len(content) or not self._chunks.has(index, content):
            raise ModelChanged(f"{self._path} changed after it was hashed, so no peer is given any of it")
        return content

    def close(self) -> None:
        """Close the file. Harmless twice."""
        self._file.close()


def _read(file: FileIO, size: int) -> bytearray:
    """The next `size` bytes; fewer only at the file's end."""
    content, filled = bytearray(size), 0
    with memoryview(content) as view:
        while filled < size and (count := file.readinto(view[filled:])):
            filled += count
    del content[filled:]
    return content


def _check_of(content: bytes) -> bytes:
    """Digest that shows a note as damaged on the disk: it would make a liar of who gives it on."""
    return blake3(content).digest(_CHECK_BYTES)


def _note_of(sha256: str, cache_dir: Path) -> Path:
    return cache_dir / "chunks" / f"{sha256}.bin"
