"""A /proc/self and the trees of control groups that it speaks of, made up in a folder."""

from __future__ import annotations

from pathlib import Path

GIB = 1 << 30


class FakeProc:
    """What a process would read. Trees are mounted below `folder`, wherever `mount` says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proc = folder / "proc"
        self.proc.mkdir()
        self._places: list[str] = []
        self._mounts: list[str] = ["22 1 254:0 / / rw,relatime - ext4 /dev/vda rw", "garbage"]

    def place(self, path: str, controllers: str = "") -> None:
        """The process is in this group; without controllers, of version 2."""
        number = len(self._places) + 1 if controllers else 0
        self._places.append(f"{number}:{controllers}:{path}")
        (self.proc / "cgroup").write_text("\n".join(self._places) + "\n")

    def mount(self, at: str, *, root: str = "/", controllers: str = "") -> Path:
        """A tree is seen at this folder, from this folder within it."""
        where = self.folder / at
        where.mkdir(parents=True, exist_ok=True)
        kind, options = ("cgroup", f"rw,{controllers}") if controllers else ("cgroup2", "rw,nsdelegate")
        escaped = str(where).replace(" ", "\\040")
        self._mounts.append(f"35 31 0:32 {root} {escaped} rw,relatime shared:9 - {kind} cgroup {options}")
        (self.proc / "mountinfo").write_text("\n".join(self._mounts) + "\n")
        return where


def write(folder: Path, **files: object) -> None:
    """Files of a control group: `write(folder, memory_max=5)` writes memory.max."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")
