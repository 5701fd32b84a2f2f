"""Models of the Hugging Face hub, of which only the shards that a span needs are fetched.

The hub publishes a SHA-256 of every weight file, so the model's revision is known before a weight is here.
Those hashes are of whole files: a span that needs one tensor of a shard fetches all of the shard, since a
range of it could not be checked. Big models come in shards of a few gigabytes, so that costs little.

Files lie in a folder per set of weights, not per commit: a new model card fetches nothing again. What
huggingface_hub's own cache already holds is linked instead of fetched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from p2pinfer.errors import CheckpointError, ModelChanged, ModelNotFound
from p2pinfer.models.configs.defaults import complete_config
from p2pinfer.models.pieces.manifest import WORDS, Holdings, Manifest, WeightFile, small_files
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan

from .checkpoint import (
    INDEX,
    SINGLE_SHARD,
    Checkpoint,
    needed_shards,
    open_shards,
    parse_index,
    refuse_pickles,
)
from .download import Pause
from .hub_errors import NoSuchModel, is_offline
from .hub_store import HubStore, Listing
from .model_source import FolderSource, Missing, ModelSource
from .spec import ModelSpec, model_spec, read_config, read_json

logger = logging.getLogger(__name__)

# Fetched where they exist.
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_FILES: Final = WORDS

_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")


def open_hub(
    model: str,
    *,
    cache_dir: Path,
    weights_bytes: int = 0,
    progress: Progress | None = None,
    endpoint: str | None = None,
    pause: Pause = time.sleep,
) -> ModelSource:
    """Find a model at the hub and fetch its config and index, no weights.

    Where the hub gives no answer the listing of the last time counts, so what was fetched once keeps working,
    and so does a model that is whole in huggingface_hub's own cache.

    Args:
        model: `owner/name`, or `owner/name@revision` for a branch, a tag or a commit.
        weights_bytes: What all models in `cache_dir` together may take there; 0: whatever is free.
        endpoint: The hub's address; by default huggingface_hub's, which HF_ENDPOINT sets.
        pause: Waits so many seconds before a download is tried again.

    Raises:
        ModelNotFound: The hub has no such model, keeps it from us, or cannot be reached.
        CheckpointError: The model is there but cannot be used.
    """
    store = HubStore(model, cache_dir, weights_bytes, endpoint, pause)
    try:
        return _open_listed(model, store, progress)
    except NoSuchModel:
        raise
    except ModelNotFound as exc:
        source = _open_snapshot(model, store, progress, exc)
        if source is None:
            raise
        return source


def open_remembered(model: str, cache_dir: Path) -> ModelSource | None:
    """The model as far as it is here, without a question to the hub; None if too little is known of it.

    Raises:
        CheckpointError: What is here cannot be used.
    """
    store = HubStore(model, cache_dir, 0, None, time.sleep)
    listing = store.recall()
    if listing is None:
        return None
    shards = _shard_names(model, listing)
    folder = store.folder_of([listing.files[name] for name in shards])
    texts = store.texts_of(folder, listing)
    if not (texts / "config.json").exists():
        return None
    return HubSource(model, store, listing, folder, texts, shards)


def _open_listed(model: str, store: HubStore, progress: Progress | None) -> HubSource:
    listing = store.ask()
    shards = _shard_names(model, listing)
    unhashed = [name for name in shards if listing.files[name].sha256 is None]
    if unhashed:
        raise CheckpointError(
            f"the hub publishes no SHA-256 of {unhashed[0]} of {model}, so the file cannot be verified"
        )
    folder = store.folder_of([listing.files[name] for name in shards])
    texts = store.texts_of(folder, listing)
    store.bring(texts, listing, ["config.json", *({INDEX} & listing.files.keys())], progress)
    return HubSource(model, store, listing, folder, texts, shards)


def _open_snapshot(
    model: str, store: HubStore, progress: Progress | None, why: ModelNotFound
) -> FolderSource | None:
    """The model out of huggingface_hub's own cache, used where it lies; None if nothing of it is there.

    Raises:
        ModelNotFound: A part of it is there.
    """
    snapshot = store.snapshot()
    if snapshot is None:
        return None
    try:
        source = FolderSource(snapshot, cache_dir=store.cache_dir, progress=progress, name=model)
    except CheckpointError as exc:
        raise ModelNotFound(f"{why}; the cache of huggingface_hub has only a part of it: {exc}") from exc
    level = logging.INFO if is_offline() else logging.WARNING
    logger.log(level, "%s; %s is used as huggingface_hub's own cache has it", why, model)
    return source


class HubSource:
    """A model of the hub; its weights come when they are asked for."""

    def __init__(
        self,
        model: str,
        store: HubStore,
        listing: Listing,
        folder: Path,
        texts: Path,
        shards: Sequence[str],
    ) -> None:
        """Weights lie in `folder`, and everything else in `texts`."""
        self._store, self._listing, self._folder, self._texts = store, listing, folder, texts
        self._layout: dict[str, frozenset[str] | None] = dict.fromkeys(shards)
        if (texts / INDEX).exists() and SINGLE_SHARD not in listing.files:
            self._layout = parse_index(read_json(texts / INDEX) or {}, texts / INDEX)
        if strange := self._layout.keys() - listing.files.keys():
            raise CheckpointError(f"{model} lacks the shard {min(strange)}, which its index names")
        hashes = {name: listing.files[name].sha256 or "" for name in self._layout}
        config = read_config(texts)
        self.spec: ModelSpec = model_spec(model, config, hashes, stored_dtype=listing.stored_dtype)
        self._config = complete_config(model, config)

    def fetch(
        self, span: BlockSpan | None, *, embedding_and_head: bool, progress: Progress | None = None
    ) -> Checkpoint:
        if span is not None:
            self.spec.check_span(span)
        needed = self._needed(span, embedding_and_head)
        self._store.bring(self._folder, self._listing, needed, progress)
        if embedding_and_head:
            self._bring_words(progress)
        shards = open_shards(self._folder, needed, cache_dir=self._store.cache_dir, progress=progress)
        for name, shard in shards.items():
            if shard.sha256 != self._listing.files[name].sha256:
                raise ModelChanged(f"{shard.path} changed while it was opened; start again")
        return Checkpoint(self._texts, self.spec, shards, self._config)

    def fetch_words(self, *, progress: Progress | None = None) -> Path:
        self._bring_words(progress)
        return self._texts

    def missing_bytes(self, span: BlockSpan | None, *, embedding_and_head: bool) -> int:
        return sum(each.size for each in self.missing(span, embedding_and_head=embedding_and_head).files)

    def missing(self, span: BlockSpan | None, *, embedding_and_head: bool) -> Missing:
        needed = [self._listing.files[name] for name in self._needed(span, embedding_and_head)]
        absent = [file for file in needed if not self._store.is_near(self._folder, file)]
        return Missing(
            self._folder, tuple(WeightFile(file.name, file.size, file.sha256 or "") for file in absent)
        )

    def holdings(self) -> Holdings:
        files = [self._listing.files[name] for name in sorted(self._layout)]
        weights = tuple(WeightFile(file.name, file.size, file.sha256 or "") for file in files)
        paths = {file.name: self._folder / file.name for file in files}
        return Holdings(
            Manifest(self.spec.model, self.spec.numbers, weights, small_files(self._texts)),
            {name: path for name, path in paths.items() if path.exists()},
            self._texts,
            is_open=self._listing.is_open,
        )

    def _bring_words(self, progress: Progress | None) -> None:
        """The tokenizer, and what is said about it; without the latter a text can be made all the same."""
        try:
            self._store.bring(self._texts, self._listing, TOKENIZER_FILES, progress)
        except ModelNotFound as exc:
            absent = [
                name
                for name in TOKENIZER_FILES
                if name in self._listing.files and not (self._texts / name).exists()
            ]
            if TOKENIZER in absent:
                raise
            logger.warning("%s; continuing without %s", exc, ", ".join(absent))

    def _needed(self, span: BlockSpan | None, embedding_and_head: bool) -> dict[str, frozenset[str] | None]:
        return needed_shards(self._layout, span, embedding_and_head)


def _shard_names(model: str, listing: Listing) -> list[str]:
    """The weight files to go by: one of the standard name, or all that lie beside an index."""
    if "config.json" not in listing.files:
        raise CheckpointError(f"{model} has no config.json at the hub, so p2pinfer cannot run it")
    if SINGLE_SHARD in listing.files:
        return [SINGLE_SHARD]
    shards = [name for name in sorted(listing.files) if name.endswith(".safetensors") and "/" not in name]
    if shards and INDEX in listing.files:
        return shards
    for name in sorted(listing.files):
        if name.endswith(_PICKLE_SUFFIXES):
            raise CheckpointError(refuse_pickles(model, name))
    raise CheckpointError(f"{model} has no weights at the hub: neither {SINGLE_SHARD} nor {INDEX}")
