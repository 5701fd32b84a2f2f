"""A folder of safetensors, opened: what tensors it holds, and each of them on demand.

A shard's header says what the shard holds and where, so opening reads headers only, and a tensor that is
read is a private view of the mapped file: no other byte of it is touched. Headers are checked by
safetensors (bounds, overlaps, length of the file), so a truncated shard fails here and not in a kernel.
Nothing else is ever opened: pickles run code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError, safe_open

from p2pinfer.errors import CheckpointError

from .defaults import complete_config
from .hashes import hash_files
from .progress import Progress
from .spec import ModelSpec, model_spec, read_config, read_json

if TYPE_CHECKING:
    from torch import Tensor

_safe_open: Any = safe_open  # a Rust extension, whose stubs pyright finds partly unknown

SINGLE_SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"[\w.+-]{1,200}\.safetensors")
_BLOCK = re.compile(r"model\.layers\.(\d{1,5})\.")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Checkpoint:
    """An opened model folder. Any thread may read; nothing has to be closed.

    Attributes:
        folder: Where it lies.
        spec: What it is.
    """

    def __init__(self, folder: Path, spec: ModelSpec, shards: Mapping[str, _Shard]) -> None:
        self.folder = folder
        self.spec = spec
        self._shards = shards
        self._shard_of = {name: shard for shard in shards.values() for name in shard.names}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The config, complete: see `complete_config`."""
        return complete_config(self.spec.model, read_config(self.folder))

    def names(self) -> frozenset[str]:
        """Every tensor that is here. Of a hub model only what was fetched is."""
        return frozenset(self._shard_of)

    def block_names(self, index: int) -> frozenset[str]:
        """The tensors of one block that are here."""
        return frozenset(name for name in self._shard_of if block_of(name) == index)

    def bytes_of(self, names: Iterable[str]) -> int:
        """How many bytes these tensors take as stored.

        Raises:
            CheckpointError: A tensor is not here.
        """
        return sum(self._locate(name).bytes_of(name) for name in names)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU and as stored: a view of the mapped file, so copy what is kept for long.

        Raises:
            CheckpointError: It is not here, or its shard changed since it was opened.
        """
        return self._locate(name).read(name)

    def unmap(self) -> None:
        """Let go of the mapped files, whose pages count as this process's; reading maps them again."""
        for shard in self._shards.values():
            shard.unmap()

    def _locate(self, name: str) -> _Shard:
        try:
            return self._shard_of[name]
        except KeyError:
            raise CheckpointError(
                f"{self.spec.model} lacks the tensor {name} (looked in {self.folder})"
            ) from None


def open_checkpoint(
    folder: Path, model: str, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Open a complete local folder; hashes its shards, which `cache_dir` remembers.

    Raises:
        CheckpointError: It cannot be used; the message says why.
    """
    config = read_config(folder)
    layout = shard_layout(folder)
    paths = [folder / name for name in layout]
    shards = open_shards(folder, layout)
    sha256 = hash_files(paths, cache_dir=cache_dir, progress=progress)
    stored = next(iter(shards.values())).stored_dtype
    spec = model_spec(model, config, dict(zip(layout, sha256, strict=True)), stored_dtype=stored)
    checkpoint = Checkpoint(folder, spec, shards)
    for index in set(range(spec.num_blocks)) - {block_of(name) for name in checkpoint.names()}:
        raise CheckpointError(
            f"{folder} holds no tensor of block {index}, and its config promises {spec.num_blocks}"
        )
    return checkpoint


def open_shards(folder: Path, layout: Mapping[str, frozenset[str] | None]) -> dict[str, _Shard]:
    """Open the shards named in `layout` and hold each to the tensors that are said to be in it.

    Raises:
        CheckpointError: A shard is missing, damaged, or lacks a tensor.
    """
    shards: dict[str, _Shard] = {}
    for file_name, names in layout.items():
        shard = _Shard(folder / file_name)
        if absent := (names or frozenset()) - shard.names:
            raise CheckpointError(f"{shard.path} lacks the tensor {min(absent)}, which {INDEX} places there")
        shards[file_name] = shard
    return shards


def shard_layout(folder: Path) -> dict[str, frozenset[str] | None]:
    """The shards that make the model, each with its tensors' names, or None where only its header knows.

    Raises:
        CheckpointError: The folder's index is damaged, or the folder holds no safetensors.
    """
    if (folder / SINGLE_SHARD).exists():
        return {SINGLE_SHARD: None}
    index = read_json(folder / INDEX)
    if index is not None:
        return parse_index(index, folder / INDEX)
    for pattern in _PICKLES:
        if pickled := sorted(folder.glob(pattern)):
            raise CheckpointError(refuse_pickles(str(folder), pickled[0].name))
    raise CheckpointError(f"{folder} holds neither {SINGLE_SHARD} nor {INDEX}: no weights to read")


def parse_index(index: Mapping[str, Any], where: Path) -> dict[str, frozenset[str] | None]:
    """The shards of a safetensors index and what it places in each, sorted by name.

    Raises:
        CheckpointError: It maps something else than tensor names to plain file names.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map; fetch it again")
    layout: dict[str, set[str]] = {}
    for name, shard in cast("dict[str, object]", weight_map).items():
        # A path here could name any file of the machine, so only plain names pass.
        if not isinstance(shard, str) or _SHARD_NAME.fullmatch(shard) is None:
            raise CheckpointError(
                f"{where} places {name} in {shard!r}, which is no safetensors file beside it"
            )
        layout.setdefault(shard, set()).add(name)
    return {shard: frozenset(layout[shard]) for shard in sorted(layout)}


def refuse_pickles(where: str, file_name: str) -> str:
    """The line for a checkpoint that holds nothing but pickles."""
    return (
        f"{where} has no safetensors, only pickled weights ({file_name}), and opening those runs whatever "
        f"code is in them; convert it with transformers' save_pretrained, or use a checkpoint that has some"
    )


def block_of(name: str) -> int | None:
    """The block that a tensor belongs to by its name; None for the ends."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


class _Shard:
    """One safetensors file, its header read and checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # As numpy: torch is imported by the first tensor that is read, not by the header.
            with _safe_open(path, framework="numpy") as file:
                names: list[str] = file.keys()
                slices: dict[str, Any] = {name: file.get_slice(name) for name in names}
                self._stored: dict[str, tuple[str, list[int]]] = {
                    name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()
                }
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; fetch the model again") from None
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(f"{path} is damaged or cut short ({exc}); fetch it again") from exc
        self.names = frozenset(self._stored)

    @property
    def stored_dtype(self) -> str:
        """The dtype of its first tensor of real numbers."""
        dtypes = (_STORED_DTYPES.get(dtype) for dtype, _ in self._stored.values())
        return next((dtype for dtype in dtypes if dtype), "float32")

    def bytes_of(self, name: str) -> int:
        dtype, shape = self._stored[name]
        if dtype not in _STORED_BYTES:
            raise CheckpointError(f"{self.path} stores {name} as {dtype}, which p2pinfer does not read")
        return _STORED_BYTES[dtype] * prod(shape)

    def read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._mapped.get_tensor(name)
        except (OSError, SafetensorError, RuntimeError, ValueError) as exc:
            raise CheckpointError(f"{self.path} changed while in use, {name} cannot be read: {exc}") from exc
        return tensor

    def unmap(self) -> None:
        self.__dict__.pop("_mapped", None)

    @cached_property
    def _mapped(self) -> Any:
        return _safe_open(self.path, framework="pt", device="cpu")
