"""The package list, the folders and the links say the same, and a wheel holds all of it and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "node", "reputation", "routing")
DATA = {"p2pinfer/bootstrap_peers.txt", "p2pinfer/py.typed"}


def packages() -> dict[str, Path]:
    """Every folder with Python modules that belongs to the package, by its import name."""
    tops = {"p2pinfer": ROOT / "p2pinfer", **{f"p2pinfer.{folder}": ROOT / folder for folder in FOLDERS}}
    found = dict(tops)
    for name, top in tops.items():
        for init in top.rglob("*/__init__.py"):  # rglob does not follow links
            inner = init.parent.relative_to(top)
            found[".".join((name, *inner.parts))] = init.parent
    return found


def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


def test_the_package_list_names_every_folder() -> None:
    assert setuptools_table()["packages"] == sorted(packages())


def test_the_package_dir_names_every_top_folder() -> None:
    expected = {"p2pinfer": "p2pinfer", **{f"p2pinfer.{folder}": folder for folder in FOLDERS}}
    assert setuptools_table()["package-dir"] == expected


def test_the_links_are_relative_and_lead_to_the_folders() -> None:
    links = {path.name: path.readlink() for path in (ROOT / "p2pinfer").iterdir() if path.is_symlink()}
    names = (*FOLDERS, "bootstrap_peers.txt")
    assert links == {name: Path("..") / name for name in names}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """A wheel built from a copy of the sources, since setuptools leaves folders beside them."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "bootstrap_peers.txt"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("p2pinfer", *FOLDERS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (built,) = out.glob("p2pinfer-*.whl")
    return zipfile.Path(built)


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_bundled_model_and_nothing_else(wheel: zipfile.Path) -> None:
    expected = set(DATA)
    for name, folder in packages().items():
        expected |= {f"{name.replace('.', '/')}/{module.name}" for module in folder.glob("*.py")}
    story = ROOT / "models" / "tiny-stories"
    expected |= {f"p2pinfer/models/tiny-stories/{file.name}" for file in story.iterdir()}
    # zipfile.Path lists the folders too
    held = {name for name in wheel.root.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert held == expected


@pytest.mark.slow
def test_the_wheel_installs_the_command(wheel: zipfile.Path) -> None:
    (metadata,) = (folder for folder in wheel.iterdir() if folder.name.endswith(".dist-info"))
    assert "p2pinfer = p2pinfer.__main__:main" in (metadata / "entry_points.txt").read_text()


@pytest.mark.slow
def test_the_wheels_bootstrap_peers_are_the_repositorys(wheel: zipfile.Path) -> None:
    held = (wheel / "p2pinfer" / "bootstrap_peers.txt").read_bytes()
    assert held == (ROOT / "bootstrap_peers.txt").read_bytes()
