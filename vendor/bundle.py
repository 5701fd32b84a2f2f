"""The build backend: setuptools, and before it builds, libp2p unpacked into the package.

pip cannot install libp2p without fastecdsa and coincurve, which it imports for kinds of keys that p2pinfer
never uses, and which have no wheels: the first for any system, the second for some Pythons. So p2pinfer does
not depend on libp2p, it contains it: the released wheel that lies beside this file, unchanged but for the
modules under `replaced/`. What libp2p itself depends on stands in pyproject.toml.

setuptools is all that this needs; nothing is fetched. See README.md beside this file.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

HERE = Path(__file__).resolve().parent
RELEASE = HERE / "libp2p-0.8.1-py3-none-any.whl"
SHA256 = "3d53daa20a6a78984c9b4ed1654d771757b187282f90376d7156c2b67828b308"
REPLACED = HERE / "replaced"
TARGET = HERE.parent / "p2pinfer" / "_vendor"
TOPS = ("libp2p/", "libp2p-0.8.1.dist-info/")  # the wheel also has `docs`, `examples` and `interop`


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """The hook of PEP 517."""
    unpack(TARGET)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """The hook of PEP 660."""
    unpack(TARGET)
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def unpack(target: Path) -> None:
    """Put libp2p, with our modules in the place of its own, into `target`, whole or not at all.

    Raises:
        RuntimeError: The wheel beside this file is not the one that was released.
    """
    if hashlib.sha256(RELEASE.read_bytes()).hexdigest() != SHA256:
        raise RuntimeError(f"{RELEASE} is not libp2p as it was released: fetch the repository again")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as folder:
        fresh = Path(folder) / "fresh"
        with zipfile.ZipFile(RELEASE) as release:
            release.extractall(fresh, [name for name in release.namelist() if name.startswith(TOPS)])
        shutil.copytree(REPLACED, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        for unwanted in (
            "RECORD",
            "entry_points.txt",
            "top_level.txt",
        ):  # of an installation that this is not
            (fresh / TOPS[1] / unwanted).unlink()
        if target.exists():
            target.rename(Path(folder) / "old")
        fresh.rename(target)
