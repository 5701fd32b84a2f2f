"""One GGUF file as a shard: tensors by transformers' names, checked, and dequantised as they are read.

A span reads its own tensors and no others. Each is read as it is stored, hashed, and laid out in float32 (a
plain one in its own dtype), so loading takes no more than the weights in place and one tensor twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from p2pinfer.errors import CheckpointError

from .gguf_config import GgufModel, Place
from .gguf_file import GgufHeader
from .hashes import FileHash
from .shard import read_checked

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN: Final[Mapping[str, str]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GgufShard:
    """A file's tensors; see `shard.Shard`, whose place it takes.

    Attributes:
        path: Where it lies.
        names: Its tensors, in transformers' terms.
        sha256: What the whole file hashed to.
    """

    def __init__(
        self, path: Path, header: GgufHeader, model: GgufModel, hashed: FileHash, cache_dir: Path | None
    ) -> None:
        self.path = path
        self.sha256 = hashed.sha256
        self._header = header
        self._hashed = hashed
        self._cache_dir = cache_dir
        self._places: dict[str, tuple[str, Place]] = {}
        for name in header.tensors:
            place = model.place(name)
            self._places[place.name] = name, place
        self.names = frozenset(self._places)

    @property
    def stored_dtype(self) -> str:
        """See the function of that name."""
        return stored_dtype(self._header)

    def bytes_of(self, name: str) -> int:
        """Bytes that a tensor takes in the file."""
        return self._header.tensors[self._places[name][0]].nbytes

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: It is of a type that is not laid out here.
            ModelChanged: It is not what was hashed.
        """
        from .gguf_quants import dequantise  # and torch, by the first tensor that is read

        stored_name, place = self._places[name]
        stored = self._header.tensors[stored_name]
        content = read_checked(self.path, stored_name, stored, self._hashed, self._cache_dir)
        try:
            tensor = dequantise(content, stored.dtype, stored.shape)
        except KeyError:
            raise CheckpointError(
                f"{self.path} stores {stored_name} as {stored.dtype}, which p2pinfer does not lay out; use a "
                "file in Q4_K_M, Q5_K_M, Q6_K, Q8_0 or 16 bits"
            ) from None
        if place.heads:
            apart = tensor.view(place.heads, -1, 2, *tensor.shape[1:])
            tensor = apart.transpose(1, 2).reshape(tensor.shape)
        return tensor


def stored_dtype(header: GgufHeader) -> str:
    """The dtype in which a file's matrices are whole: that of most bytes; bfloat16 if one is quantised."""
    matrices = [each for each in header.tensors.values() if len(each.shape) > 1]
    sizes: dict[str, int] = {}
    for each in matrices:
        sizes[each.dtype] = sizes.get(each.dtype, 0) + each.nbytes
    if not sizes or not sizes.keys() <= _PLAIN.keys():
        return "bfloat16"
    return _PLAIN[max(sizes, key=lambda kind: sizes[kind])]
