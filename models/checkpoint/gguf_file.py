"""Header of a GGUF file: its metadata, and names, types, shapes and byte ranges of its tensors.

The format is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. The file is read and not mapped,
for the reasons in `shard.py`, and every length in it is held to the file's own before it is believed. The
package `gguf` maps the whole file and reads arrays number by number; the tests hold this reader to it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from p2pinfer.errors import CheckpointError
from p2pinfer.models.pieces.shard_header import Stored

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MOST_ENTRIES: Final = 1 << 20  # of metadata and of tensors; published files have hundreds
_MOST_DIMENSIONS: Final = 4
_ALIGNMENT: Final = 32  # where the file says no other
_NUMBERS: Final[Mapping[int, str]] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class TensorType:
    """A ggml type: how many numbers lie in how many bytes."""

    name: str
    numbers: int
    bytes: int


TENSOR_TYPES: Final[Mapping[int, TensorType]] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Contents of a GGUF file but for its tensors' bytes.

    Attributes:
        metadata: Values by key; arrays are lists.
        tensors: By name as in the file, in the order of their bytes; shapes are torch's, rows first.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def open_gguf_header(path: Path) -> GgufHeader:
    """The header of a file.

    Raises:
        CheckpointError: There is no such file, it is no whole GGUF file, or a tensor's type is not read here.
    """
    try:
        with path.open("rb") as file:
            return read_gguf_header(file, str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fetch the model again") from None
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} is damaged or cut short ({exc}); fetch it again") from exc


def read_gguf_header(file: BinaryIO, where: str = "the file") -> GgufHeader:
    """The header of a file that is open at its beginning.

    Raises:
        CheckpointError: A tensor is of a type that is not read here.
        ValueError: That is no GGUF file, or not all of it.
    """
    return _Reader(file, where).read()


class _Reader:
    """Reads a header once, from its beginning."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file = file
        self._where = where
        self._size = os.fstat(file.fileno()).st_size

    def read(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version}, and 2 and 3 are read")
        tensors, entries = self._count(), self._count()
        metadata = {self._string(): self._value(self._number("I")) for _ in range(entries)}
        found = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
            raise ValueError("an alignment of no sense")
        first = -(-self._file.tell() // alignment) * alignment
        return GgufHeader(metadata, self._placed(found, first))

    def _placed(
        self, found: list[tuple[str, TensorType, tuple[int, ...], int]], first: int
    ) -> dict[str, Stored]:
        placed: dict[str, Stored] = {}
        end = first
        for name, kind, shape, offset in sorted(found, key=lambda each: each[3]):
            start = first + offset
            stop = start + prod(shape) // kind.numbers * kind.bytes
            if start < end or stop > self._size:
                raise ValueError(f"{name:.60} lies outside of the file, or over another tensor")
            placed[name] = Stored(kind.name, shape, start, stop)
            end = stop
        if len(placed) != len(found):
            raise ValueError("two tensors of one name")
        return placed

    def _tensor(self) -> tuple[str, TensorType, tuple[int, ...], int]:
        name = self._string()
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name:.60} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        number = self._number("I")
        kind = TENSOR_TYPES.get(number)
        if kind is None:
            known = ", ".join(each.name for each in TENSOR_TYPES.values())
            raise CheckpointError(
                f"{self._where} stores {name:.60} as ggml type {number}, which p2pinfer does not read; "
                f"it reads {known}"
            )
        if shape[-1] % kind.numbers or prod(shape) > 1 << 48:
            raise ValueError(f"{name:.60} has rows of {shape[-1]} numbers, which {kind.name} cannot hold")
        return name, kind, shape, self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}")
        return self._number(_NUMBERS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._number("I"), self._number("Q")
        if kind == _ARRAY:
            raise ValueError("an array of arrays")
        if kind == _STRING:
            if count > self._size // 8:
                raise ValueError("an array that is longer than the file")
            return [self._string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"values of type {kind}")
        code = _NUMBERS[kind]
        return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", "replace")

    def _count(self) -> int:
        count: int = self._number("Q")
        if count > _MOST_ENTRIES:
            raise ValueError(f"{count} entries")
        return count

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        if count > self._size:
            raise ValueError("a length beyond the file's")
        taken = self._file.read(count)
        if len(taken) < count:
            raise ValueError("the header ends in the middle")
        return taken


def is_gguf(file: BinaryIO) -> bool:
    """True if a file that is open at its beginning is GGUF; it is left there."""
    begins: Callable[[int], bytes] = file.read
    found = begins(len(MAGIC)) == MAGIC
    file.seek(0)
    return found
