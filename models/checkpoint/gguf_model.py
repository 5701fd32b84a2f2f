"""Model in a GGUF file, or in several parts of one, opened as a checkpoint.

What a folder has in config.json and tokenizer.json is made of the file's metadata, and written to a folder of
the cache that is named by the file's hash. So whatever reads a model folder reads this one. A tokenizer.json
beside the GGUF counts more than one that is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from p2pinfer.errors import CheckpointError
from p2pinfer.models.configs.defaults import complete_config
from p2pinfer.models.progress import Progress

from .checkpoint import Checkpoint, block_of
from .gguf_config import ROPE_DIVISORS, GgufModel
from .gguf_file import GgufHeader, open_gguf_header
from .gguf_shard import GgufShard, stored_dtype
from .gguf_tokenizer import tokenizer_files
from .hashes import FileHash, hash_shards
from .shard import read_checked
from .spec import ModelSpec, model_spec

_PART: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)")
_SPECIFIC: Final = ("float32", "float16", "bfloat16")  # of several parts the last of these counts
_BESIDE: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def open_gguf(
    path: Path, model: str, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Open a GGUF file, or all parts of one by any of them; hashes them, which `cache_dir` remembers.

    Raises:
        CheckpointError: It cannot be used; the message says why.
    """
    paths = _parts(path)
    headers = [open_gguf_header(each) for each in paths]
    hashes = hash_shards(paths, cache_dir=cache_dir, progress=progress)
    described = GgufModel(model, headers[0].metadata)
    divisors = _divisors(paths, headers, hashes, cache_dir)
    shards = {
        each.name: GgufShard(each, _without_divisors(header), described, hashed, cache_dir)
        for each, header, hashed in zip(paths, headers, hashes, strict=True)
    }
    names = frozenset().union(*(shard.names for shard in shards.values()))
    config = described.config(names, _vocab_size(model, headers), divisors)
    stored = max((shard.stored_dtype for shard in shards.values()), key=_SPECIFIC.index)
    sha256 = {name: shard.sha256 for name, shard in shards.items()}
    spec = model_spec(model, config, sha256, stored_dtype=stored)
    for index in set(range(spec.num_blocks)) - {block_of(name) for name in names}:
        raise CheckpointError(f"{path} has no tensors of block {index}, but says {spec.num_blocks} blocks")
    folder = _texts(path, spec.revision, config, headers[0].metadata, cache_dir)
    return Checkpoint(folder, spec, shards, complete_config(model, config))


def describe_gguf(path: Path, model: str) -> ModelSpec:
    """Spec of a GGUF file, or of all parts of one by any of them, from its headers alone.

    What divides the frequencies of positions is left out, since it is a tensor: the context is at least as
    long as the spec says.

    Raises:
        CheckpointError: It cannot be used; the message says why.
    """
    headers = [_without_divisors(open_gguf_header(each)) for each in _parts(path)]
    described = GgufModel(model, headers[0].metadata)
    names = frozenset(described.place(name).name for header in headers for name in header.tensors)
    stored = max((stored_dtype(header) for header in headers), key=_SPECIFIC.index)
    config = described.config(names, _vocab_size(model, headers), None)
    return model_spec(model, config, {}, stored_dtype=stored)


def _parts(path: Path) -> list[Path]:
    """All files of a model, in order."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found[3])
    return [
        path.with_name(f"{found[1]}-{number:05}-of-{count:05}{found[4]}") for number in range(1, count + 1)
    ]


def _divisors(
    paths: list[Path], headers: list[GgufHeader], hashes: list[FileHash], cache_dir: Path | None
) -> list[float] | None:
    for path, header, hashed in zip(paths, headers, hashes, strict=True):
        if (stored := header.tensors.get(ROPE_DIVISORS)) is not None:
            if stored.dtype != "F32":
                raise CheckpointError(f"{path} has {ROPE_DIVISORS} as {stored.dtype}, and not as F32")
            content = read_checked(path, ROPE_DIVISORS, stored, hashed, cache_dir)
            import torch

            values: list[float] = content.view(torch.float32).tolist()
            # As decimals, so that the same list comes of every file that has them.
            return (
                None if all(value == 1 for value in values) else [float(f"{value:.7g}") for value in values]
            )
    return None


def _without_divisors(header: GgufHeader) -> GgufHeader:
    rest = {name: stored for name, stored in header.tensors.items() if name != ROPE_DIVISORS}
    return GgufHeader(header.metadata, rest)


def _vocab_size(model: str, headers: list[GgufHeader]) -> int:
    for header in headers:
        if (embedding := header.tensors.get("token_embd.weight")) is not None:
            return embedding.shape[0]
    raise CheckpointError(f"{model} has no token_embd.weight, so no embedding")


def _texts(
    path: Path, revision: str, config: Mapping[str, Any], metadata: Mapping[str, Any], cache_dir: Path | None
) -> Path:
    """The folder with what config.json and the tokenizer's files would be."""
    if cache_dir is None:
        return path.parent
    files: dict[str, bytes] = {"config.json": json.dumps(config).encode()}
    for name, content in tokenizer_files(metadata).items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        files[name] = text.encode()
    try:
        files |= {
            name: (path.parent / name).read_bytes() for name in _BESIDE if (path.parent / name).is_file()
        }
        digest = blake3()
        for name, written in sorted(files.items()):
            digest.update(f"{name} {len(written)}\n".encode() + written)
        # Named by what it holds, so that no process ever writes where another one reads.
        folder = cache_dir / "gguf" / f"{revision}-{digest.hexdigest()[:16]}"
        draft = folder.with_name(f".{folder.name}.{os.getpid()}")
        if not folder.is_dir():
            draft.mkdir(parents=True, exist_ok=True)
            for name, written in files.items():
                (draft / name).write_bytes(written)
            with contextlib.suppress(OSError):  # another process was faster, and made the same
                draft.rename(folder)
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as exc:
        raise CheckpointError(f"{exc.filename} cannot be written: {exc.strerror}") from exc
    return folder
