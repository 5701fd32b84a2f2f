from __future__ import annotations

from pathlib import Path

import pytest

from p2pinfer.models.machine.control_groups import ControlGroup, control_groups

from ..fake_proc import FakeProc, write


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def test_every_group_around_the_process_counts_innermost_first(proc: FakeProc) -> None:
    proc.place("/system.slice/node.service")
    tree = proc.mount("sys/fs/cgroup")
    inner = tree / "system.slice" / "node.service"
    inner.mkdir(parents=True)
    assert control_groups("memory", proc.proc) == [
        ControlGroup(folder, 2) for folder in (inner, inner.parent, tree)
    ]


def test_in_a_container_of_version_1_the_path_begins_where_the_mount_does(proc: FakeProc) -> None:
    """Docker without a namespace for control groups: both name the container, which is all that is seen."""
    proc.place("/docker/4f2a/worker", "memory")
    tree = proc.mount("sys/fs/cgroup/memory", root="/docker/4f2a", controllers="memory")
    (tree / "worker").mkdir()
    assert control_groups("memory", proc.proc) == [ControlGroup(tree / "worker", 1), ControlGroup(tree, 1)]


@pytest.mark.parametrize("path", ["/../../elsewhere", "/not/seen/here"])
def test_a_place_that_is_not_seen_leaves_the_folder_that_is(proc: FakeProc, path: str) -> None:
    proc.place(path)
    tree = proc.mount("sys/fs/cgroup")
    assert control_groups("memory", proc.proc) == [ControlGroup(tree, 2)]


def test_a_machine_may_have_both_kinds(proc: FakeProc) -> None:
    proc.place("/", "cpu,cpuacct")
    proc.place("/a", "memory")
    proc.place("/a")
    first = proc.mount("sys/fs/cgroup/memory", controllers="memory")
    second = proc.mount("sys/fs/cgroup/unified tree")  # written as unified\040tree
    proc.mount("sys/fs/cgroup/cpu", controllers="cpu,cpuacct")
    groups = control_groups("memory", proc.proc)
    assert groups == [ControlGroup(first, 1), ControlGroup(second, 2)]
    assert [group.folder.name for group in control_groups("cpuacct", proc.proc)] == ["cpu", "unified tree"]


def test_without_control_groups_there_are_none(tmp_path: Path, proc: FakeProc) -> None:
    assert control_groups("memory", tmp_path / "nothing") == []
    proc.place("/")
    (proc.proc / "mountinfo").write_text("22 1 254:0 / / rw - ext4 /dev/vda rw\n\n- \n")
    assert control_groups("memory", proc.proc) == []


def test_files_that_say_something_else_say_nothing(tmp_path: Path) -> None:
    write(tmp_path, memory_max="max", memory_high="-1", memory_stat="anon 5\nnot a pair\nfile x\n")
    group = ControlGroup(tmp_path, 2)
    assert group.number("memory.max") is None
    assert group.number("memory.high") == -1
    assert group.number("memory.low") is None
    assert group.table("memory.stat") == {"anon": 5}
    assert group.table("memory.events") == {}
