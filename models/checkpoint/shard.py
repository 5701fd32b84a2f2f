"""One safetensors file, whose tensors are checked against their digests when they are read.

A tensor is read into memory of its own and hashed there. A mapped file would be its writer's to change after
the check, and to cut short, which ends a process that touches the missing pages with SIGBUS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from p2pinfer.errors import CheckpointError, ModelChanged
from p2pinfer.models.pieces.shard_header import DTYPE_BYTES, Stored

from .hashes import FileHash, forget_hash

if TYPE_CHECKING:
    from torch import Tensor

_TORCH_DTYPES: Final[Mapping[str, str]] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
_STORED_DTYPES: Final[Mapping[str, str]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Shard:
    """A shard's tensors.

    Attributes:
        path: Where it lies.
        names: Its tensors.
        sha256: What the whole file hashed to.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Stored], hashed: FileHash, cache_dir: Path | None
    ) -> None:
        self.path = path
        self.names = frozenset(header)
        self.sha256 = hashed.sha256
        self._header = header
        self._hashed = hashed
        self._cache_dir = cache_dir

    @property
    def stored_dtype(self) -> str:
        """The dtype of its first tensor of real numbers, by name."""
        dtypes = (_STORED_DTYPES.get(self._header[name].dtype) for name in sorted(self.names))
        return next((dtype for dtype in dtypes if dtype), "float32")

    def bytes_of(self, name: str) -> int:
        """Bytes that a tensor takes.

        Raises:
            CheckpointError: It is of a dtype that is not read here.
        """
        return self._readable(name).nbytes

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: It is of a dtype that is not read here.
            ModelChanged: It is not what was hashed.
        """
        import torch  # by the first tensor that is read, not by the header

        stored = self._readable(name)
        content = read_checked(self.path, name, stored, self._hashed, self._cache_dir)
        return content.view(getattr(torch, _TORCH_DTYPES[stored.dtype])).view(stored.shape)

    def _readable(self, name: str) -> Stored:
        stored = self._header[name]
        if stored.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{self.path} stores {name} as {stored.dtype}, which p2pinfer does not read"
            )
        return stored


def read_checked(path: Path, name: str, stored: Stored, hashed: FileHash, cache_dir: Path | None) -> Tensor:
    """The bytes of a tensor, (n,) uint8, in memory of their own.

    Raises:
        ModelChanged: They are not what was hashed.
    """
    import torch

    def refuse(why: str) -> NoReturn:
        forget_hash(path, cache_dir=cache_dir)
        raise ModelChanged(
            f"{path} changed after it was hashed: {name} is not used, because {why}; "
            f"start p2pinfer again when the folder is complete"
        )

    content = torch.empty(stored.nbytes, dtype=torch.uint8)
    buffer = content.numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            filled = 0
            while filled < stored.nbytes and (count := file.readinto(buffer[filled:])):
                filled += count
    except OSError as exc:
        refuse(exc.strerror or str(exc))
    if filled < stored.nbytes:
        refuse("it was cut short")
    digest = stored.digest()
    digest.update(buffer)
    if digest.hexdigest() != hashed.tensors.get(name):
        refuse("its content differs")
    return content
