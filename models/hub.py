"""Models of the Hugging Face hub: what is published is known first, and only what is needed is fetched.

The hub publishes a SHA-256 of every weight file, so the model's revision is known before a weight is here.
Those hashes are of whole files: a span that needs one tensor of a shard fetches all of the shard, since a
range of it could not be checked. Big models come in shards of a few gigabytes, so that costs little.

Files lie in a folder per set of weights, not per commit: a new model card fetches nothing again. What
huggingface_hub's own cache already holds is linked instead of fetched.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import huggingface_hub.constants
import msgspec
from blake3 import blake3
from huggingface_hub import errors

from p2pinfer.errors import CheckpointError, ModelChanged, ModelNotFound

from .checkpoint import (
    INDEX,
    SINGLE_SHARD,
    Checkpoint,
    block_of,
    open_shards,
    parse_index,
    refuse_pickles,
)
from .defaults import complete_config
from .download import Pause, Published, TransportError, download
from .hashes import hash_files
from .parallel import Count, run_counted
from .progress import Progress
from .span import BlockSpan
from .spec import ModelSpec, model_spec, read_config, read_json

logger = logging.getLogger(__name__)

# What says how text becomes tokens, which of them end it, and how one draws them; fetched where they exist.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)

_PARALLEL_DOWNLOADS = 4
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Listing:
    """What the hub publishes of a model at one commit."""

    commit: str
    stored_dtype: str
    files: dict[str, Published]


def open_hub(
    model: str,
    *,
    cache_dir: Path,
    weights_bytes: int = 0,
    progress: Progress | None = None,
    endpoint: str | None = None,
    pause: Pause = time.sleep,
) -> HubSource:
    """Find a model at the hub and fetch its config and index, no weights.

    With no network the listing of the last time counts, so what was fetched once keeps working.

    Args:
        weights_bytes: What all models in `cache_dir` together may take there; 0: whatever is free.
        endpoint: The hub's address; by default huggingface_hub's, which HF_ENDPOINT sets.
        pause: Waits so many seconds before a download is tried again.

    Raises:
        ModelNotFound: The hub has no such model, keeps it from us, or cannot be reached.
        CheckpointError: The model is there but cannot be used.
    """
    store = _Store(model, cache_dir, weights_bytes, endpoint, pause)
    listing = store.ask()
    shards = _shard_names(model, listing)
    unhashed = [name for name in shards if listing.files[name].sha256 is None]
    if unhashed:
        raise CheckpointError(
            f"the hub publishes no SHA-256 of {unhashed[0]} of {model}, so it cannot be checked"
        )
    folder = store.folder_of([listing.files[name] for name in shards])
    store.bring(folder, listing, ["config.json", *({INDEX} & listing.files.keys())], progress)
    return HubSource(model, store, listing, folder, shards)


class HubSource:
    """A model of the hub; its weights come when they are asked for."""

    def __init__(
        self, model: str, store: _Store, listing: Listing, folder: Path, shards: Sequence[str]
    ) -> None:
        self._store, self._listing, self._folder = store, listing, folder
        self._layout: dict[str, frozenset[str] | None] = dict.fromkeys(shards)
        if (folder / INDEX).exists() and SINGLE_SHARD not in listing.files:
            self._layout = parse_index(read_json(folder / INDEX) or {}, folder / INDEX)
        if strange := self._layout.keys() - listing.files.keys():
            raise CheckpointError(f"{model} lacks the shard {min(strange)}, which its index names")
        hashes = {name: listing.files[name].sha256 or "" for name in self._layout}
        config = read_config(folder)
        self.spec: ModelSpec = model_spec(model, config, hashes, stored_dtype=listing.stored_dtype)
        self._config = complete_config(model, config)

    def fetch(self, span: BlockSpan | None, *, ends: bool, progress: Progress | None = None) -> Checkpoint:
        if span is not None:
            self.spec.check_span(span)
        needed = self._needed(span, ends)
        words = TOKENIZER_FILES if ends else ()
        self._store.bring(self._folder, self._listing, [*needed, *words], progress)
        shards = open_shards(self._folder, needed, cache_dir=self._store.cache_dir, progress=progress)
        for name, shard in shards.items():
            if shard.sha256 != self._listing.files[name].sha256:
                raise ModelChanged(f"{shard.path} changed while it was opened; start again")
        return Checkpoint(self._folder, self.spec, shards, self._config)

    def missing_bytes(self, span: BlockSpan | None, *, ends: bool) -> int:
        files = self._listing.files
        return sum(
            files[shard].size
            for shard in self._needed(span, ends)
            if not (self._folder / shard).exists()  # whether it is right shows when it is fetched
        )

    def _needed(self, span: BlockSpan | None, ends: bool) -> dict[str, frozenset[str] | None]:
        return {
            shard: names
            for shard, names in self._layout.items()
            if names is None or _serves(names, span, ends)
        }


class _Store:
    """One model's place on this disk and its address at the hub."""

    def __init__(
        self, model: str, cache_dir: Path, weights_bytes: int, endpoint: str | None, pause: Pause
    ) -> None:
        self._model = model
        self.cache_dir = cache_dir
        self._weights_bytes = weights_bytes
        self._api = huggingface_hub.HfApi(endpoint=endpoint)
        self._pause = pause
        self._root = cache_dir / "hub" / model.replace("/", "--")

    def ask(self) -> Listing:
        """What the hub publishes, or published when it was last asked."""
        remembered = self._root / "listing.json"
        try:
            listing = _listing(self._api.model_info(self._model, files_metadata=True, timeout=_timeout_s()))
        except Exception as exc:  # a captive portal's answer can fail anywhere in huggingface_hub's parsing
            known = None
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                known = msgspec.json.decode(remembered.read_bytes(), type=Listing)
            if known is None or not _is_out_of_reach(exc):
                raise self._explain(exc) from exc
            logger.info("the hub cannot be reached; %s is used as it was fetched before", self._model)
            return known
        self._remember(listing, remembered)
        return listing

    def _remember(self, listing: Listing, path: Path) -> None:
        """Keep a listing for a day without network; the one before stays if there is no room for it."""
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(msgspec.json.encode(listing))
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as exc:
            logger.info("%s cannot be written: %s; without network the model will be unknown", path, exc)

    def folder_of(self, shards: Iterable[Published]) -> Path:
        """Where the files of a model with these weights lie."""
        content = "\n".join(sorted(f"{shard.name} {shard.sha256}" for shard in shards))
        return self._root / blake3(content.encode()).hexdigest()[:16]

    def bring(self, folder: Path, listing: Listing, names: Iterable[str], progress: Progress | None) -> None:
        """Have these files in `folder`, those that the hub lists, each with the content it publishes."""
        try:
            self._bring(folder, listing, names, progress)
        except (TransportError, OSError) as exc:
            raise self._explain(exc) from exc

    def _bring(self, folder: Path, listing: Listing, names: Iterable[str], progress: Progress | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [listing.files[name] for name in names if name in listing.files]
        missing = self._missing(folder, wanted, progress)
        missing = [file for file in missing if not self._adopt(folder, file, listing.commit)]
        if not missing:
            return
        self._check_room(folder, missing)
        total = sum(file.size for file in missing)
        label = f"fetching {self._model}" + (f" ({len(missing)} files)" if len(missing) > 1 else "")
        jobs = [partial(self._download, file, folder, listing.commit) for file in missing]
        run_counted(jobs, label=label, total_bytes=total, threads=_PARALLEL_DOWNLOADS, progress=progress)

    def _download(self, file: Published, folder: Path, commit: str, count: Count) -> None:
        url = huggingface_hub.hf_hub_url(self._model, file.name, revision=commit, endpoint=self._api.endpoint)
        download(file, url, folder, count=count, pause=self._pause)

    def _missing(
        self, folder: Path, wanted: Sequence[Published], progress: Progress | None
    ) -> list[Published]:
        """Those that are not here as published; what is here with other contents is removed."""
        here = [file for file in wanted if (folder / file.name).exists()]
        weights = [file for file in here if file.sha256 is not None]
        paths = [folder / file.name for file in weights]
        hashes = hash_files(paths, cache_dir=self.cache_dir, progress=progress)
        right = {file for file, sha256 in zip(weights, hashes, strict=True) if sha256 == file.sha256}
        right |= {file for file in here if file.sha256 is None and _is_as_published(folder, file)}
        for file in here:
            if file not in right:
                logger.info("%s differs from what the hub publishes; fetching it again", folder / file.name)
                (folder / file.name).unlink()
        return [file for file in wanted if file not in right]

    def _adopt(self, folder: Path, file: Published, commit: str) -> bool:
        """Link the file from huggingface_hub's cache, if it is there and right."""
        cached = huggingface_hub.try_to_load_from_cache(self._model, file.name, revision=commit)
        if file.sha256 is None or not isinstance(cached, str):
            return False
        if hash_files([Path(cached)], cache_dir=self.cache_dir) != [file.sha256]:
            return False
        link = folder / file.name
        with contextlib.suppress(OSError):  # not every file system has links
            link.unlink(missing_ok=True)
            link.symlink_to(Path(cached).resolve())
            return True
        return False

    def _check_room(self, folder: Path, missing: Sequence[Published]) -> None:
        parts = [folder / f"{file.name}.part" for file in missing]
        needed = sum(file.size for file in missing) - sum(p.stat().st_size for p in parts if p.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CheckpointError(
                f"{self._model} needs {needed / 1e9:.1f} GB more in {self.cache_dir}, where "
                f"{free / 1e9:.1f} GB are free; make room or choose another cache directory"
            )
        if self._weights_bytes and needed + (used := self._used_bytes()) > self._weights_bytes:
            raise CheckpointError(
                f"{self._model} needs {needed / 1e9:.1f} GB more, and models in {self.cache_dir} take "
                f"{used / 1e9:.1f} of the {self._weights_bytes / 1e9:.1f} GB that weights_bytes allows; "
                f"raise it, or remove models from {self._root.parent}"
            )

    def _used_bytes(self) -> int:
        """What the models in the cache directory take, this one's files and parts included."""
        files = (path for path in self._root.parent.rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_size for path in files)

    def _explain(self, exc: Exception) -> ModelNotFound:
        """One line for a person, whatever huggingface_hub raised."""
        model, endpoint = self._model, self._api.endpoint
        match exc:
            case errors.GatedRepoError():
                text = f"{model} is gated: accept its terms at {endpoint}/{model}, then set HF_TOKEN"
            case errors.RepositoryNotFoundError():
                text = f"the hub has no model {model}, or keeps it private; check the name, or set HF_TOKEN"
            case errors.OfflineModeIsEnabled():
                text = f"{model} is not here, and HF_HUB_OFFLINE forbids to fetch it; unset that"
            case errors.HfHubHTTPError():
                status = exc.response.status_code
                text = f"the hub at {endpoint} answers {status} when asked for {model}; try again later"
            case _ if _is_out_of_reach(exc):
                text = f"the hub at {endpoint} cannot be reached for {model}; connect, or set HF_ENDPOINT"
            case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
                text = (
                    f"there is no room left for {model} in {self.cache_dir}; "
                    f"make some and start again: what has come is kept"
                )
            case OSError(errno=errno.EROFS | errno.EACCES | errno.EPERM):
                text = (
                    f"{self.cache_dir} cannot be written ({exc.strerror}), and not all of {model} is there; "
                    f"choose another cache directory, with --set cache_dir=DIR"
                )
            case OSError():
                text = f"{model} cannot be stored in {self.cache_dir}: {exc}"
            case errors.HFValidationError():
                text = (
                    f"there is no folder {model}, and it is no id of the Hugging Face hub (owner/name) either"
                )
            case _:
                text = f"what answers at {endpoint} is no hub ({exc}); check the connection and HF_ENDPOINT"
        return ModelNotFound(text)


def _listing(info: Any) -> Listing:
    """What matters of huggingface_hub's ModelInfo."""
    files = {
        file.rfilename: Published(
            file.rfilename,
            file.lfs.size if file.lfs else file.size,
            sha256=file.lfs.sha256 if file.lfs else None,
            git_sha1=None if file.lfs else file.blob_id,
        )
        for file in info.siblings or ()
        if file.lfs or file.size is not None
    }
    counts: dict[str, int] = info.safetensors.parameters if info.safetensors else {}
    commonest = max(counts, key=lambda dtype: counts[dtype], default="F32")
    return Listing(info.sha, _STORED_DTYPES.get(commonest, "float32"), files)


def _shard_names(model: str, listing: Listing) -> list[str]:
    """The weight files to go by: one of the standard name, or all that lie beside an index."""
    if "config.json" not in listing.files:
        raise CheckpointError(
            f"{model} has no config.json at the hub, so it is no model that can be run here"
        )
    if SINGLE_SHARD in listing.files:
        return [SINGLE_SHARD]
    shards = [name for name in sorted(listing.files) if name.endswith(".safetensors") and "/" not in name]
    if shards and INDEX in listing.files:
        return shards
    for name in sorted(listing.files):
        if name.endswith(_PICKLE_SUFFIXES):
            raise CheckpointError(refuse_pickles(model, name))
    raise CheckpointError(f"{model} has neither {SINGLE_SHARD} nor {INDEX} at the hub: no weights to read")


def _serves(names: Iterable[str], span: BlockSpan | None, ends: bool) -> bool:
    """Whether any of these tensors belongs to the span, or with `ends` to no block."""
    blocks = {block_of(name) for name in names}
    if span is not None and not blocks.isdisjoint(range(span.start, span.stop)):
        return True
    return ends and None in blocks


def _is_as_published(folder: Path, file: Published) -> bool:
    content = (folder / file.name).read_bytes()
    digest = file.digest()
    digest.update(content)
    return len(content) == file.size and file.is_matched_by(digest)


def _is_out_of_reach(exc: Exception) -> bool:
    """Whether the hub gave no answer that counts: no connection, offline on purpose, or an outage."""
    if isinstance(exc, errors.HfHubHTTPError):
        return exc.response.status_code >= 500
    return isinstance(exc, (TransportError, ConnectionError))


def _timeout_s() -> float:
    return float(cast("Any", huggingface_hub.constants).HF_HUB_ETAG_TIMEOUT)
