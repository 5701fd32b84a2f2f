"""Model that is named by its content and lies in the cache as far as peers have given it.

Its folder has the manifest (every weight file and its SHA-256), the config, and what has come of the rest.
Who named the revision vouches for all of it but the tokenizer, which a name of its own vouches for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from p2pinfer.errors import CheckpointError, ModelChanged, ModelNotFound
from p2pinfer.models.configs.defaults import complete_config
from p2pinfer.models.pieces.manifest import (
    CONFIG,
    INDEX_FILE,
    WORDS,
    Holdings,
    Manifest,
    SwarmName,
    parse_swarm_name,
    small_files,
    words_digest,
)
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

from .checkpoint import SINGLE_SHARD, Checkpoint, needed_shards, open_shards, parse_index
from .model_source import Missing
from .spec import ModelSpec, model_spec, read_config, read_json

MANIFEST: Final = "manifest.json"


def folder_of(revision: str, cache_dir: Path) -> Path:
    """Folder of a model of this revision that came from peers."""
    return cache_dir / "peers" / revision


def stored_models(cache_dir: Path) -> list[StoredModel]:
    """All models that came from peers, as far as they can be opened."""
    found: list[StoredModel] = []
    for folder in sorted((cache_dir / "peers").glob("*")):
        if (name := parse_swarm_name(f"swarm:{folder.name}")) is not None:
            try:
                found.append(open_stored(name, cache_dir))
            except (CheckpointError, ModelNotFound):
                continue
    return found


def remember_manifest(manifest: Manifest, cache_dir: Path) -> Path:
    """Begin the folder of a model; returns it.

    Raises:
        CheckpointError: The disk refuses.
    """
    folder = folder_of(manifest.revision, cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{MANIFEST}.{os.getpid()}"
        draft.write_bytes(msgspec.json.encode(manifest))
        draft.replace(folder / MANIFEST)
    except OSError as exc:
        raise CheckpointError(f"{folder} cannot be written: {exc.strerror}") from exc
    return folder


def open_stored(name: SwarmName, cache_dir: Path, *, progress: Progress | None = None) -> StoredModel:
    """The model of this name, as far as it is here.

    Raises:
        ModelNotFound: Nothing of it is here.
        CheckpointError: What is here cannot be used.
    """
    folder = folder_of(name.revision, cache_dir)
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        manifest.check()
    except (OSError, msgspec.MsgspecError, CheckpointError) as exc:
        raise ModelNotFound(
            f"{name} is not here; `p2pinfer models pull {name}` fetches it from peers, and "
            f"`p2pinfer node --model {name}` as much of it as the node serves"
        ) from exc
    if manifest.revision != name.revision:
        raise CheckpointError(f"{folder} is of another revision; `p2pinfer models remove {name}`")
    return StoredModel(name, manifest, folder, cache_dir, progress)


class StoredModel:
    """A `ModelSource` that asks nobody: what is missing is brought by whoever can."""

    def __init__(
        self, name: SwarmName, manifest: Manifest, folder: Path, cache_dir: Path, progress: Progress | None
    ) -> None:
        self.name = name
        self.manifest = manifest
        self.folder = folder
        self._cache_dir = cache_dir
        hashes = {each.name: each.sha256 for each in manifest.weights}
        if manifest.is_gguf:
            self._layout: dict[str, frozenset[str] | None] = dict.fromkeys(hashes)
            from .gguf_model import open_gguf

            path = folder / min(hashes)
            self.spec: ModelSpec = open_gguf(
                path, manifest.model, cache_dir=cache_dir, progress=progress
            ).spec
            return
        config = read_config(folder)
        self.spec = model_spec(manifest.model, config, hashes)
        self._config = complete_config(manifest.model, config)
        self._layout = dict.fromkeys(hashes)
        if (folder / INDEX_FILE).exists() and SINGLE_SHARD not in hashes:
            self._layout = parse_index(read_json(folder / INDEX_FILE) or {}, folder / INDEX_FILE)
        if strange := self._layout.keys() - hashes.keys():
            raise CheckpointError(f"{name} lacks the shard {min(strange)}, which its index names")

    def fetch(
        self, span: BlockSpan | None, *, embedding_and_head: bool, progress: Progress | None = None
    ) -> Checkpoint:
        if span is not None:
            self.spec.check_span(span)
        if missing := self.missing(span, embedding_and_head=embedding_and_head).files:
            raise ModelNotFound(
                f"{missing[0].name} of {self.name} is not here; `p2pinfer models pull {self.name}` fetches it"
            )
        if self.manifest.is_gguf:
            from .gguf_model import open_gguf

            path = self.folder / min(self._layout)
            return open_gguf(path, self.manifest.model, cache_dir=self._cache_dir, progress=progress)
        needed = needed_shards(self._layout, span, embedding_and_head)
        shards = open_shards(self.folder, needed, cache_dir=self._cache_dir, progress=progress)
        said = {each.name: each.sha256 for each in self.manifest.weights}
        for name, shard in shards.items():
            if shard.sha256 != said[name]:
                shard.path.unlink(missing_ok=True)
                raise ModelChanged(
                    f"{shard.path} was not what the revision says, and is removed; start again"
                )
        return Checkpoint(self.folder, self.spec, shards, self._config)

    def fetch_words(self, *, progress: Progress | None = None) -> Path:
        if self.manifest.is_gguf:  # which has its tokenizer within
            return self.fetch(None, embedding_and_head=True, progress=progress).folder
        here = words_digest(small_files(self.folder))
        if not here or (self.name.words and here != self.name.words):
            raise ModelNotFound(
                f"the tokenizer of {self.name} is not here. A revision does not cover it, so take the longer "
                "name that `p2pinfer models show` prints where the model is, and `p2pinfer models pull` that"
            )
        return self.folder

    def missing_bytes(self, span: BlockSpan | None, *, embedding_and_head: bool) -> int:
        return sum(each.size for each in self.missing(span, embedding_and_head=embedding_and_head).files)

    def missing(self, span: BlockSpan | None, *, embedding_and_head: bool) -> Missing:
        needed = needed_shards(self._layout, span, embedding_and_head)
        files = [each for each in self.manifest.weights if each.name in needed]
        return Missing(self.folder, tuple(each for each in files if not (self.folder / each.name).exists()))

    def holdings(self) -> Holdings:
        paths = {each.name: self.folder / each.name for each in self.manifest.weights}
        here = {name: path for name, path in paths.items() if path.exists()}
        texts = small_files(self.folder)
        return Holdings(
            Manifest(self.manifest.model, self.manifest.numbers, self.manifest.weights, texts),
            here,
            self.folder,
            is_open=True,
        )


def wanted_texts(name: SwarmName) -> tuple[str, ...]:
    """Small files that a model of this name needs."""
    return (CONFIG, INDEX_FILE, *(WORDS if name.words else ()))
