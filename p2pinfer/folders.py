"""Default folders of data, cache and configuration, also for a user without a home."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import platformdirs

from .errors import ConfigError


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
        raise ConfigError(f"{path}: {Path(path).parts[0]} is nobody's home directory; write it out") from exc


def is_homeless() -> bool:
    """True if this user has no home directory, so that things are kept in the temporary directory."""
    return not _platform_folder("data").is_absolute()


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
        raise ConfigError(f"this user has no home directory, and {folder} is not this user's alone; set HOME")
    return folder
