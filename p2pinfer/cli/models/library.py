"""Models on this computer's disk: what is here of each, what of it is right, and what fits into memory."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pinfer.errors import CheckpointError, ConfigError, ModelNotFound
from p2pinfer.models.checkpoint.hashes import forget_hash, hash_files
from p2pinfer.models.checkpoint.model_source import ModelSource
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.checkpoint.stored_model import folder_of, stored_models
from p2pinfer.models.pieces.manifest import Holdings, SwarmName, parse_swarm_name
from p2pinfer.models.progress import Progress


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model as it lies on the disk."""

    name: str  # by which commands take it
    kind: str  # "bundled", "hub" or "peers"
    revision: str  # empty where too little of it is here to tell
    bytes_here: int
    bytes_whole: int  # 0: not known
    folder: Path

    @property
    def is_whole(self) -> bool:
        """True if all of its weights are here."""
        return 0 < self.bytes_whole <= self.bytes_here


@dataclass(frozen=True, slots=True)
class Checked:
    """A weight file that was hashed anew."""

    name: str
    is_right: bool
    bytes: int


def held_models(cache_dir: Path) -> list[HeldModel]:
    """All models of the cache, and the bundled one."""
    found = [_held(BUNDLED_MODEL, "bundled", resolve_model(BUNDLED_MODEL, cache_dir=cache_dir))]
    found += _hub_models(cache_dir)
    found += [_held(str(swarm_name(each.holdings())), "peers", each) for each in stored_models(cache_dir)]
    return found


def swarm_name(holdings: Holdings) -> SwarmName:
    """The name by which another node can have this model from peers."""
    manifest = holdings.manifest
    return SwarmName(manifest.revision, manifest.words)


def check_files(source: ModelSource, cache_dir: Path, progress: Progress | None = None) -> list[Checked]:
    """Hash what is here of a model anew. What is wrong is removed if it lies in the cache.

    Raises:
        CheckpointError: A file cannot be read.
    """
    holdings = source.holdings()
    wanted = {each.name: each for each in holdings.manifest.weights}
    paths = [holdings.paths[name] for name in sorted(holdings.paths)]
    for path in paths:
        forget_hash(path, cache_dir=cache_dir)
    found: list[Checked] = []
    for path, sha256 in zip(paths, hash_files(paths, cache_dir=cache_dir, progress=progress), strict=True):
        is_right = sha256 == wanted[path.name].sha256
        found.append(Checked(path.name, is_right, path.stat().st_size))
        if not is_right and cache_dir in path.parents:
            path.unlink()
    return found


def remove_model(name: str, cache_dir: Path) -> int:
    """Remove a model from the cache; returns the bytes that this frees.

    Raises:
        ConfigError: It is not in the cache: a folder of the user's is the user's to remove.
        ModelNotFound: Nothing of it is here.
        CheckpointError: The disk refuses.
    """
    if (named := parse_swarm_name(name)) is not None:
        folder = folder_of(named.revision, cache_dir)
    elif name == BUNDLED_MODEL:
        raise ConfigError(f"{name} is part of p2pinfer; uninstall that to be rid of it")
    elif Path(name).expanduser().exists():
        raise ConfigError(f"{name} is not in {cache_dir}; remove it as you put it there")
    else:
        folder = cache_dir / "hub" / name.partition("@")[0].replace("/", "--")
    if folder.parent not in (cache_dir / "hub", cache_dir / "peers") or not folder.is_dir():
        raise ModelNotFound(f"nothing of {name} is in {cache_dir}; `p2pinfer models` lists what is")
    freed = _size_of(folder)
    try:
        shutil.rmtree(folder)
    except OSError as exc:
        raise CheckpointError(f"{exc.filename} cannot be removed: {exc.strerror}") from exc
    return freed


def _held(name: str, kind: str, source: ModelSource) -> HeldModel:
    holdings = source.holdings()
    here = sum(each.size for each in holdings.manifest.weights if each.name in holdings.paths)
    whole = sum(each.size for each in holdings.manifest.weights)
    return HeldModel(name, kind, source.spec.revision, here, whole, holdings.folder)


def _hub_models(cache_dir: Path) -> Iterator[HeldModel]:
    folders: Sequence[Path] = sorted((cache_dir / "hub").glob("*"))
    if not folders:
        return
    from p2pinfer.models.checkpoint.hub import open_remembered  # the hub's HTTP takes 0.3 s to import

    for folder in folders:
        name = folder.name.replace("--", "/", 1)
        source = None
        with contextlib.suppress(CheckpointError, ModelNotFound, OSError):
            source = open_remembered(name, cache_dir)
        yield (
            HeldModel(name, "hub", "", _size_of(folder), 0, folder)
            if source is None
            else _held(name, "hub", source)
        )


def _size_of(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_size for path in files)
