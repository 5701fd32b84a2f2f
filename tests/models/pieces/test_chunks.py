"""Files in chunks: lists, readers, and files that come in any order."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from p2pinfer.errors import CheckpointError, ModelChanged
from p2pinfer.models.checkpoint.hashes import hash_stream
from p2pinfer.models.pieces.chunks import CHUNK_BYTES, ChunkList, ChunkReader, list_chunks, recall_chunks
from p2pinfer.models.pieces.partial_file import NotHere, PartialFile

CONTENT = bytes(range(256)) * (3 * CHUNK_BYTES // 256) + b"and a rest"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def part(index: int) -> bytes:
    return CONTENT[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


def test_a_list_has_a_digest_for_each_chunk_and_is_remembered(path: Path, tmp_path: Path) -> None:
    chunks = list_chunks(path, SHA256, tmp_path / "cache")
    assert (chunks.size, len(chunks), chunks.bytes_of(3)) == (len(CONTENT), 4, len(b"and a rest"))
    assert all(chunks.has(index, part(index)) for index in range(4))
    assert not chunks.has(0, part(3)) and not chunks.has(3, part(3) + b"\0")
    path.unlink()
    assert (
        list_chunks(path, SHA256, tmp_path / "cache") == chunks == recall_chunks(SHA256, tmp_path / "cache")
    )


def test_a_file_of_another_hash_gets_no_list(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelChanged):
        list_chunks(path, "0" * 64, tmp_path)
    assert recall_chunks("0" * 64, tmp_path) is None
    with pytest.raises(CheckpointError):
        list_chunks(tmp_path / "absent", SHA256, tmp_path)


@pytest.mark.parametrize("note", [b"", b"\0" * 8, (5).to_bytes(8, "big") + b"\0" * 31])
def test_a_damaged_note_of_a_list_is_made_anew(path: Path, tmp_path: Path, note: bytes) -> None:
    chunks = list_chunks(path, SHA256, tmp_path)
    [kept] = (tmp_path / "chunks").iterdir()
    kept.write_bytes(note)
    assert list_chunks(path, SHA256, tmp_path) == chunks
    damaged = bytearray(kept.read_bytes())
    damaged[20] ^= 1
    kept.write_bytes(damaged)
    assert list_chunks(path, SHA256, tmp_path) == chunks


def test_a_chunk_that_changed_on_the_disk_is_not_read(path: Path, tmp_path: Path) -> None:
    chunks = list_chunks(path, SHA256, tmp_path)
    reader = ChunkReader(path, chunks)
    assert bytes(reader.read(3)) == part(3)
    altered = bytearray(CONTENT)
    altered[CHUNK_BYTES] ^= 1
    path.write_bytes(altered)
    assert bytes(reader.read(0)) == part(0)
    with pytest.raises(ModelChanged):
        reader.read(1)
    path.write_bytes(CONTENT[: CHUNK_BYTES // 2])
    with pytest.raises(ModelChanged):
        reader.read(0)
    reader.close()
    path.unlink()
    with pytest.raises(ModelChanged):
        ChunkReader(path, chunks)


def test_a_file_comes_in_any_order_and_goes_on_where_it_ended(path: Path, tmp_path: Path) -> None:
    chunks = list_chunks(path, SHA256, tmp_path)
    target = tmp_path / "there" / "model.safetensors"
    first = PartialFile(target, chunks)
    assert first.open() == {0, 1, 2, 3}
    first.write(3, part(3))
    first.write(1, part(1))
    first.close()
    first.close()
    with pytest.raises(NotHere):
        first.write(0, part(0))
    second = PartialFile(target, chunks)
    assert second.open() == {0, 2}
    second.write(0, part(0))
    second.write(2, part(2))
    second.finish()
    assert target.read_bytes() == CONTENT and not second.draft.exists()


def test_what_an_earlier_run_left_is_not_trusted(path: Path, tmp_path: Path) -> None:
    chunks = list_chunks(path, SHA256, tmp_path)
    file = PartialFile(tmp_path / "target", chunks)
    file.draft.write_bytes(part(0) + bytes(CHUNK_BYTES) + part(2) + b"and a rest, and more than there is")
    assert file.open() == {1}
    assert file.draft.stat().st_size == chunks.size
    file.discard()
    assert not file.draft.exists()


def test_a_file_is_hashed_while_it_comes(path: Path, tmp_path: Path) -> None:
    chunks = list_chunks(path, SHA256, tmp_path)
    file = PartialFile(tmp_path / "target", chunks)
    file.open()
    found: list[str] = []
    hashing = threading.Thread(target=lambda: found.append(hash_stream(file.follow()).sha256))
    hashing.start()
    for index in (2, 0, 3, 1):
        file.write(index, part(index))
    hashing.join()
    file.close()
    assert found == [SHA256]


def test_who_waits_for_the_rest_of_a_file_hears_that_it_will_not_come(path: Path, tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "target", list_chunks(path, SHA256, tmp_path))
    file.open()
    file.write(0, part(0))
    raised: list[BaseException] = []

    def read() -> None:
        try:
            hash_stream(file.follow())
        except NotHere as exc:
            raised.append(exc)

    reading = threading.Thread(target=read)
    reading.start()
    file.close()
    reading.join()
    assert len(raised) == 1


def test_a_disk_that_refuses_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be written"):
        PartialFile(tmp_path / "file" / "target", ChunkList(1, bytes(32))).open()
