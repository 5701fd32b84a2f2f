"""Folder of safetensors files, read tensor by tensor.

A shard's header says what the shard holds and where. Headers are checked by safetensors (bounds, overlaps,
length of the file), so a truncated shard fails here and not in a kernel. What is read later is held to what
was hashed here (shard.py): a folder may be written anew under a process that lives on. Nothing else is ever
opened: pickles run code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from p2pinfer.errors import CheckpointError
from p2pinfer.models.configs.defaults import complete_config
from p2pinfer.models.configs.quantization import published_of
from p2pinfer.models.pieces.shard_header import open_header
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

from .hashes import hash_shards
from .published import Parts, lay_out, weights_of
from .shard import Shard
from .spec import ModelSpec, model_spec, read_config, read_json

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"[\w.+-]{1,200}\.safetensors")
_BLOCK = re.compile(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d{1,5})\.")
# What checkpoints of BLOOM leave out: transformers adds the model's prefix where it is missing.
_BARE = re.compile(r"(?:h\.\d{1,5}|word_embeddings|word_embeddings_layernorm|ln_f)\.")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorFile(Protocol):
    """A file of tensors, of either format.

    Attributes:
        names: Its tensors.
        sha256: What the whole file hashed to.
    """

    names: frozenset[str]
    sha256: str

    @property
    def stored_dtype(self) -> str:
        """The dtype that its weights are whole in, by name."""
        ...

    def bytes_of(self, name: str) -> int:
        """Bytes that a tensor takes in the file."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        ...


class Checkpoint:
    """An opened model folder. Any thread may read; nothing has to be closed.

    Attributes:
        folder: Where it lies.
        spec: What it is.
        config: Its config as it was hashed, complete: see `complete_config`.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, shards: Mapping[str, TensorFile], config: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.config = config
        self._shards = shards
        self._places = {full_name(name): (shard, name) for shard in shards.values() for name in shard.names}
        self._published = published_of(config)
        self._weights: Mapping[str, Parts] = (
            {name: {"": name} for name in self._places}
            if self._published is None
            else weights_of(self._places, self._published)
        )

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of the files that are here, by name."""
        return {name: shard.sha256 for name, shard in self._shards.items()}

    def names(self) -> frozenset[str]:
        """Every tensor that is here. Of a hub model only what was fetched is."""
        return frozenset(self._weights)

    def block_names(self, index: int) -> frozenset[str]:
        """The tensors of one block that are here."""
        return frozenset(name for name in self._weights if block_of(name) == index)

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes that these tensors take as stored.

        Raises:
            CheckpointError: A tensor is not here.
        """
        parts = [part for name in names for part in self._parts(name).values()]
        return sum(shard.bytes_of(stored) for shard, stored in map(self._locate, parts))

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory that is the caller's: as stored, or float32 if it is quantised.

        Raises:
            CheckpointError: It is not here, or its parts do not fit together.
            ModelChanged: It is not what was hashed.
        """
        tensors: dict[str, Tensor] = {}
        for suffix, part in self._parts(name).items():
            shard, stored = self._locate(part)
            tensors[suffix] = shard.read(stored)
        if self._published is None or "" in tensors:
            whole = tensors[""]
            if whole.is_floating_point() and whole.itemsize == 1:  # no scale says what it stands for
                raise CheckpointError(
                    f"{self.spec.model} stores {name} as {whole.dtype}, which p2pinfer does not read"
                )
            return whole
        return lay_out(name, tensors, self._published)

    def _parts(self, name: str) -> Parts:
        return self._weights.get(name, {"": name})

    def _locate(self, name: str) -> tuple[TensorFile, str]:
        try:
            return self._places[name]
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
    shards = open_shards(folder, shard_layout(folder), cache_dir=cache_dir, progress=progress)
    stored = next(iter(shards.values())).stored_dtype
    sha256 = {name: shard.sha256 for name, shard in shards.items()}
    spec = model_spec(model, config, sha256, stored_dtype=stored)
    checkpoint = Checkpoint(folder, spec, shards, complete_config(model, config))
    for index in set(range(spec.num_blocks)) - {block_of(name) for name in checkpoint.names()}:
        raise CheckpointError(
            f"{folder} has no tensors of block {index}, but its config.json says {spec.num_blocks} blocks; "
            "fetch the model again"
        )
    return checkpoint


def open_shards(
    folder: Path,
    layout: Mapping[str, frozenset[str] | None],
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Shard]:
    """Open and hash the shards named in `layout`, and hold each to the tensors that are said to be in it.

    Raises:
        CheckpointError: A shard is missing, damaged, or lacks a tensor.
    """
    headers = {name: open_header(folder / name) for name in layout}
    for name, promised in layout.items():
        if absent := (promised or frozenset()) - headers[name].keys():
            raise CheckpointError(
                f"{folder / name} lacks the tensor {min(absent)}, which {INDEX} lists for it; fetch it again"
            )
    paths = [folder / name for name in layout]
    hashes = hash_shards(paths, cache_dir=cache_dir, progress=progress)
    return {
        path.name: Shard(path, headers[path.name], hashed, cache_dir)
        for path, hashed in zip(paths, hashes, strict=True)
    }


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
    raise CheckpointError(f"{folder} has no weights: neither {SINGLE_SHARD} nor {INDEX}")


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
                f"{where} lists {name} in {shard!r}, which is not a safetensors file of the same folder"
            )
        layout.setdefault(shard, set()).add(name)
    return {shard: frozenset(layout[shard]) for shard in sorted(layout)}


def needed_shards(
    layout: Mapping[str, frozenset[str] | None], span: BlockSpan | None, embedding_and_head: bool
) -> dict[str, frozenset[str] | None]:
    """The shards of `layout` that hold a span, and on request what belongs to no block."""
    return {
        shard: names
        for shard, names in layout.items()
        if names is None or _serves(names, span, embedding_and_head)
    }


def _serves(names: Iterable[str], span: BlockSpan | None, embedding_and_head: bool) -> bool:
    """True if any of these tensors belongs to the span, or with `embedding_and_head` to no block."""
    blocks = {block_of(name) for name in names}
    if span is not None and not blocks.isdisjoint(range(span.start, span.stop)):
        return True
    return embedding_and_head and None in blocks


def refuse_pickles(where: str, file_name: str) -> str:
    """The line for a checkpoint that holds nothing but pickles."""
    return (
        f"{where} has no safetensors, only pickled weights ({file_name}), and opening those runs whatever "
        f"code is in them; convert it with transformers' save_pretrained, or use a checkpoint that has some"
    )


def block_of(name: str) -> int | None:
    """The block that a tensor belongs to by its name; None outside of all blocks."""
    match = _BLOCK.match(full_name(name))
    return int(match[1]) if match else None


def full_name(name: str) -> str:
    """A tensor's name with the prefix of its model."""
    return f"transformer.{name}" if _BARE.match(name) else name
