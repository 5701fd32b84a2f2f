"""Header of a safetensors file: names, shapes and byte ranges of its tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from blake3 import blake3

from p2pinfer.errors import CheckpointError

DTYPE_BYTES: Final[Mapping[str, int]] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
_MAX_HEADER_BYTES: Final = 100_000_000  # as safetensors has it
_MAX_DIMENSIONS: Final = 32
_MAX_NUMBER: Final = 1 << 62
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file: its bytes are `[start, stop)` of it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.stop - self.start

    def digest(self) -> blake3:
        """A hash to be fed the tensor's bytes; it covers dtype and shape as well."""
        return blake3(f"{self.dtype} {self.shape}\n".encode())


def open_header(path: Path) -> dict[str, Stored]:
    """The tensors in a file by name, in the order of their bytes.

    Raises:
        CheckpointError: There is no such file, or it is no whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            stored = read_header(file)
            end = max((tensor.stop for tensor in stored.values()), default=file.tell())
            if (size := os.fstat(file.fileno()).st_size) != end:
                raise ValueError(f"{size} bytes where the header ends at {end}")
        # The library is not asked: it imports numpy, which is 15 MB of a client without weights. What is read
        # later is held against its hash in any case.
        return stored
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fetch the model again") from None
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} is damaged or cut short ({exc}); fetch it again") from exc


def read_header(file: BinaryIO, *, most: int = _MAX_HEADER_BYTES) -> dict[str, Stored]:
    """The tensors in a file that is open at its beginning; it is left at the first tensor's first byte.

    Args:
        most: Bytes that the header may have.

    Raises:
        ValueError: That is no safetensors header.
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 2 <= length <= most:
        raise ValueError(f"a header of {length} bytes")
    text = file.read(length)
    first = _LENGTH_BYTES + length
    try:
        entries: Any = json.loads(text)
        stored = {
            str(name): _stored(entry, first) for name, entry in entries.items() if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as exc:
        raise ValueError("a header that is no list of tensors") from exc
    stored = dict(sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop)))
    at = first
    for tensor in stored.values():
        if tensor.start != at:
            raise ValueError("a header with holes")
        at = tensor.stop
    return stored


def _stored(entry: Any, first: int) -> Stored:
    start, stop = entry["data_offsets"]
    stored = Stored(
        str(entry["dtype"]), tuple(map(int, entry["shape"])), first + int(start), first + int(stop)
    )
    # A product of long numbers would take the interpreter for minutes.
    if len(stored.shape) > _MAX_DIMENSIONS or max((0, stored.stop, *stored.shape)) > _MAX_NUMBER:
        raise ValueError("a tensor of more numbers than there can be")
    itemsize = DTYPE_BYTES.get(stored.dtype)
    if min((0, *stored.shape)) < 0 or stored.stop < stored.start:
        raise ValueError("a tensor of negative size")
    if itemsize is not None and stored.nbytes != itemsize * prod(stored.shape):
        raise ValueError("a tensor of another size than its shape has")
    return stored
