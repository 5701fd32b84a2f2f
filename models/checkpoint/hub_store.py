"""Local store of one hub model: its folder on this disk, and the requests to the hub."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import huggingface_hub.constants
import msgspec
from blake3 import blake3
from huggingface_hub import errors

from p2pinfer.errors import CheckpointError, ModelNotFound
from p2pinfer.models.progress import Progress

from .download import Pause, Published, TransportError, download
from .hashes import hash_files
from .hub_errors import NoSuchModel, explain, is_offline
from .parallel import Count, run_counted

logger = logging.getLogger(__name__)

_PARALLEL_DOWNLOADS = 4
_STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Listing:
    """Files that the hub publishes of a model at one commit."""

    commit: str
    stored_dtype: str
    files: dict[str, Published]
    is_open: bool = False  # anybody may have it, without a token


def split_id(model: str) -> tuple[str, str | None]:
    """`owner/name@revision` as the model's id and the branch, tag or commit; None where none is named."""
    repo, _, revision = model.partition("@")
    return repo, revision or None


class HubStore:
    """One model's place on this disk and its address at the hub."""

    def __init__(
        self, model: str, cache_dir: Path, weights_bytes: int, endpoint: str | None, pause: Pause
    ) -> None:
        self._model = model
        self._repo, self._revision = split_id(model)
        self.cache_dir = cache_dir
        self._weights_bytes = weights_bytes
        self._api = huggingface_hub.HfApi(endpoint=endpoint)
        self._pause = pause
        self._root = cache_dir / "hub" / self._repo.replace("/", "--")

    def ask(self) -> Listing:
        """The listing that the hub publishes, or published when it was last asked.

        Whatever keeps the hub from answering, what is remembered serves instead; only its word that there is
        no such model, or revision, counts for more.

        Raises:
            NoSuchModel: The hub says so.
            ModelNotFound: There is no answer, and none is remembered.
        """
        known = self.recall()
        if known is not None and (is_offline() or known.commit == self._revision):
            return known
        try:
            if is_offline():
                raise errors.OfflineModeIsEnabled("asked for by the user")
            info = self._api.model_info(
                self._repo, revision=self._revision, files_metadata=True, timeout=_timeout_s()
            )
            listing = _listing(info)
        except Exception as exc:  # a captive portal's answer can fail anywhere in huggingface_hub's parsing
            error = self._explain(exc)
            if known is None or isinstance(error, NoSuchModel):
                raise error from exc
            logger.warning("%s; using the files of %s that were downloaded before", error, self._repo)
            return known
        self._remember(listing)
        return listing

    @property
    def _memory(self) -> Path:
        """File with the last listing of each revision that was asked for."""
        pinned = f"-{quote(self._revision, safe='')}" if self._revision else ""
        return self._root / f"listing{pinned}.json"

    def recall(self) -> Listing | None:
        """The listing of the last time, if there was one."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(self._memory.read_bytes(), type=Listing)
        return None

    def snapshot(self) -> Path | None:
        """The folder in which huggingface_hub's own cache has the model, as far as it has it."""
        with contextlib.suppress(OSError, ValueError):
            found = huggingface_hub.try_to_load_from_cache(self._repo, "config.json", revision=self._revision)
            return Path(found).parent if isinstance(found, str) else None
        return None

    def _remember(self, listing: Listing) -> None:
        """Keep a listing for a day without network; the one before stays if there is no room for it."""
        path = self._memory
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(msgspec.json.encode(listing))
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as exc:
            logger.info("%s cannot be written: %s; the model cannot be used offline", path, exc)

    def folder_of(self, shards: Iterable[Published]) -> Path:
        """Folder of the files of a model with these weights."""
        content = "\n".join(sorted(f"{shard.name} {shard.sha256}" for shard in shards))
        return self._root / blake3(content.encode()).hexdigest()[:16]

    def texts_of(self, folder: Path, listing: Listing) -> Path:
        """Folder of its small files: beside the weights, or, of a revision that was named, by themselves.

        Two revisions may have the same weights and another tokenizer, and both may be in use.
        """
        return folder / f"at-{listing.commit[:16]}" if self._revision else folder

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
        self._check_line()
        label = f"fetching {self._model}" + (f" ({len(missing)} files)" if len(missing) > 1 else "")
        jobs = [partial(self._download, file, folder, listing.commit) for file in missing]
        run_counted(jobs, label=label, total_bytes=total, threads=_PARALLEL_DOWNLOADS, progress=progress)

    def _check_line(self) -> None:
        """Nothing, if there can be a connection to the hub; no thread has to find that out by itself."""
        if is_offline():
            raise self._explain(errors.OfflineModeIsEnabled("asked for by the user"))
        try:
            huggingface_hub.get_session()
        except Exception as exc:  # a proxy of a kind that is not known, or that needs a package
            raise self._explain(exc) from exc

    def _explain(self, exc: Exception) -> ModelNotFound:
        return explain(exc, self._repo, self._revision, self._api.endpoint, self.cache_dir)

    def _download(self, file: Published, folder: Path, commit: str, count: Count) -> None:
        url = huggingface_hub.hf_hub_url(self._repo, file.name, revision=commit, endpoint=self._api.endpoint)
        download(file, url, folder, count=count, pause=self._pause)

    def _missing(
        self, folder: Path, wanted: Sequence[Published], progress: Progress | None
    ) -> list[Published]:
        """Files that are not here as published; what is here with other contents is removed."""
        here = [file for file in wanted if (folder / file.name).exists()]
        weights = [file for file in here if file.sha256 is not None]
        paths = [folder / file.name for file in weights]
        hashes = hash_files(paths, cache_dir=self.cache_dir, progress=progress)
        right = {file for file, sha256 in zip(weights, hashes, strict=True) if sha256 == file.sha256}
        right |= {file for file in here if file.sha256 is None and _is_as_published(folder / file.name, file)}
        for file in here:
            if file not in right:
                logger.info("%s differs from what the hub publishes; fetching it again", folder / file.name)
                (folder / file.name).unlink()
        return [file for file in wanted if file not in right]

    def is_near(self, folder: Path, file: Published) -> bool:
        """True if the file is on this disk; whether it is right shows when it is brought."""
        return (folder / file.name).exists() or any(map(_is_file, self._elsewhere(file)))

    def _elsewhere(self, file: Published) -> list[Path]:
        """The file in huggingface_hub's own cache, of whichever commit: files are stored by their hash."""
        kept = (
            Path(cast("Any", huggingface_hub.constants).HF_HUB_CACHE)
            / f"models--{self._repo.replace('/', '--')}"
        )
        digest = file.sha256 or file.git_sha1
        return [kept / "blobs" / digest] if digest else []

    def _adopt(self, folder: Path, file: Published, commit: str) -> bool:
        """Link the file from huggingface_hub's own cache, if it is there and right."""
        found = [path for path in self._elsewhere(file) if _is_file(path)]
        cached = huggingface_hub.try_to_load_from_cache(self._repo, file.name, revision=commit)
        if isinstance(cached, str):  # where there are no links, a file lies under its name
            found.append(Path(cached))
        for path in found:
            # It may be damaged or another user's, and not every file system has links: then it is fetched.
            with contextlib.suppress(OSError, CheckpointError):
                if self._is_right(path, file):
                    link = folder / file.name
                    link.unlink(missing_ok=True)
                    link.symlink_to(path.resolve())
                    return True
        return False

    def _is_right(self, path: Path, file: Published) -> bool:
        if file.sha256 is not None:
            return hash_files([path], cache_dir=self.cache_dir) == [file.sha256]
        return _is_as_published(path, file)

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
        """Bytes that models take in the cache directory, this one's files and parts included."""
        files = (path for path in self._root.parent.rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_size for path in files)


def _listing(info: Any) -> Listing:
    """The parts of huggingface_hub's ModelInfo that are used here."""
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
    is_open = not (info.private or info.gated)
    return Listing(info.sha, _STORED_DTYPES.get(commonest, "float32"), files, is_open)


def _is_file(path: Path) -> bool:
    with contextlib.suppress(OSError):  # in a folder that we may not enter
        return path.is_file()
    return False


def _is_as_published(path: Path, file: Published) -> bool:
    content = path.read_bytes()
    digest = file.digest()
    digest.update(content)
    return len(content) == file.size and file.is_matched_by(digest)


def _timeout_s() -> float:
    return float(cast("Any", huggingface_hub.constants).HF_HUB_ETAG_TIMEOUT)
