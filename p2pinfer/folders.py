"""Folders of a user: the default ones, also without a home, and the permissions of what is kept in them.

A data directory is its user's alone: mode 0700, and 0600 for the files in it. What an older version left open
is closed when it is used again. A directory that also holds somebody else's files keeps its own permissions;
only the files of p2pinfer in it are closed. Windows has no such bits: there, files are as private as their
folder, which in a user's profile means that user and the administrators. File systems like FAT, and some
network shares, ignore `chmod`; that is said in the log.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import platformdirs

from .errors import ConfigError

logger = logging.getLogger(__name__)

# Names that p2pinfer gives, with what SQLite, lock files and drafts add to them. A kept resume token has a
# name of eight digits.
OWN_NAMES: Final = re.compile(
    r"\.?(identity\.key|ledger\.sqlite|node\.lock|node\.holder\.json|peers\.json|ports\.json"
    r"|last_span\.json|sequence|resume|status\.json|trainings|bootstrap_peers\.txt|config\.toml|[0-9a-f]{8})([.-].*)?"
)
_OTHERS: Final = 0o077  # what the group and everybody else may do


def data_folder() -> Path:
    """The user's folder for data; see `_of_user`."""
    return _of_user("data")


def cache_folder() -> Path:
    """The user's folder for what can be fetched again; see `_of_user`."""
    return _of_user("cache")


def config_folder() -> Path:
    """The user's folder for settings; see `_of_user`."""
    return _of_user("config")


def expand(path: str | Path) -> Path:
    """`path` with its ~ replaced.

    Raises:
        ConfigError: It begins with the home of somebody who has none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as exc:
        raise ConfigError(
            f"{path}: {Path(path).parts[0]} is not the home directory of a known user; write the full path"
        ) from exc


def is_homeless() -> bool:
    """True if this user has no home directory, so that things are kept in the temporary directory."""
    return not _platform_folder("data").is_absolute()


def make_private(folder: Path) -> None:
    """Create a data directory, or close the one that an older version made.

    Raises:
        OSError: It cannot be created.
    """
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        if os.name == "posix":
            _close_existing(folder)


def write_private(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a file's content, so that no reader sees half of it and nobody else reads it at all.

    Args:
        path: Its folder is created if need be.
        content: All of the file.
        durable: Have it on the disk before this returns, in case of a power cut.

    Raises:
        OSError: Nothing was replaced.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def create_private(path: Path) -> None:
    """Create an empty file for a library that would create it open to others; harmless if it exists.

    Raises:
        OSError: It cannot be created.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _of_user(kind: str) -> Path:
    """The platform's folder of that kind; for a user that has no home, one in the temporary directory.

    A user id without an account and without HOME is what containers run as. The folder is that user's alone:
    somebody else's config.toml may name a policy, which is code.

    Raises:
        ConfigError: There is no home, and the place in the temporary directory is not to be trusted.
    """
    folder = _platform_folder(kind)
    return folder if folder.is_absolute() else _homeless() / kind


def _platform_folder(kind: str) -> Path:
    try:
        return Path(getattr(platformdirs, f"user_{kind}_dir")("p2pinfer"))
    except RuntimeError:  # what newer platformdirs do without a home; older ones return ~/...
        return Path()


def _homeless() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"p2pinfer-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as exc:
        raise ConfigError(
            f"this user has no home directory, and {folder} cannot be made ({exc.strerror}); set HOME"
        ) from exc
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise ConfigError(f"this user has no home directory, and other users can write to {folder}; set HOME")
    return folder


def _close_existing(folder: Path) -> None:
    with suppress(OSError):  # it may vanish, and may be somebody else's: whoever writes there will say so
        entries = [*folder.iterdir()]
        ours = [each for each in entries if OWN_NAMES.fullmatch(each.name)]
        for each in ours:
            _close(each)
        # A home, or a folder that a group shares, is not to be closed because a node was pointed at it. Nor
        # is one that everybody may write to, which the sticky bit marks.
        if len(ours) == len(entries) and not folder.stat().st_mode & stat.S_ISVTX:
            _close(folder)


def _close(path: Path) -> None:
    """Take a file or folder of this user's from everybody else."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid() or not found.st_mode & _OTHERS:
        return
    try:
        path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)
        still_open = bool(path.lstat().st_mode & _OTHERS)
    except OSError:
        still_open = True
    if still_open:
        logger.warning("%s can be read by other users, and its file system does not let that change", path)
