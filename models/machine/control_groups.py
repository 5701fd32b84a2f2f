"""Control groups of this process on Linux, from its own up to the root.

Containers and service managers limit processes by them. There are two kinds of trees, and machines that have
both: version 2 is one tree with all limits, version 1 a tree for each controller. /proc/self/cgroup says
where in a tree the process is, /proc/self/mountinfo where the tree is seen, which in a container may be from
a folder within it. See the kernel's admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """One folder of limits."""

    folder: Path
    version: int  # 1 or 2

    def number(self, name: str) -> int | None:
        """The whole number in a file; None if there is no such file, or it says "max"."""
        text = self.text(name).strip()
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    def table(self, name: str) -> dict[str, int]:
        """A file of lines with a key and a whole number."""
        pairs = (line.split() for line in self.text(name).splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}

    def text(self, name: str) -> str:
        """Content of a file; empty if it cannot be read."""
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


def control_groups(controller: str, proc: Path = PROC) -> list[ControlGroup]:
    """The groups whose limits of a controller, such as "memory", hold for this process, innermost first.

    Args:
        proc: The process's folder in /proc.

    Returns:
        None where there are no control groups; those of version 1 before those of version 2.
    """
    try:
        places = (proc / "cgroup").read_text(encoding="utf-8", errors="replace")
        mounts = (proc / "mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    groups: list[ControlGroup] = []
    for version in (1, 2):
        place = _place(places, controller if version == 1 else "")
        mount = _mount(mounts, controller if version == 1 else "")
        if place is not None and mount is not None:
            groups += [ControlGroup(folder, version) for folder in _upwards(place, *mount)]
    return groups


def _place(text: str, controller: str) -> PurePosixPath | None:
    """Place of this process in a controller's tree; the tree of version 2 has none."""
    for line in text.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(",") and path.startswith("/"):
            return PurePosixPath(path)
    return None


def _mount(text: str, controller: str) -> tuple[PurePosixPath, Path] | None:
    """Folder of that tree that is mounted, and its mount point; the last mount hides those before."""
    found = None
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, kind = head.split(), tail.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        wanted = (
            kind[0] == "cgroup" and controller in kind[2].split(",") if controller else kind[0] == "cgroup2"
        )
        if wanted:
            found = PurePosixPath(_unescaped(fields[3])), Path(_unescaped(fields[4]))
    return found


def _upwards(place: PurePosixPath, root: PurePosixPath, mount: Path) -> Iterator[Path]:
    """The folders from the process's up to the mount's."""
    inner = place.relative_to(root) if place.is_relative_to(root) else PurePosixPath()
    if ".." in inner.parts:  # above the root of its namespace
        inner = PurePosixPath()
    for folder in (inner, *inner.parents):
        if (mount / folder).is_dir():
            yield mount / folder


def _unescaped(field: str) -> str:
    """A field of mountinfo, which writes spaces and the like as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
