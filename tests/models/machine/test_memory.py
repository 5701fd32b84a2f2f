"""What a process may still take, in trees that are made up and in one that the kernel keeps."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from p2pinfer.errors import CheckpointError, OutOfMemory
from p2pinfer.models.machine.memory import FreeMemory, free_memory, free_on_card, is_refusal, refusals_named

from ..fake_proc import GIB, FakeProc, write

CPU = torch.device("cpu")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProc:
    """A machine with 40 GiB free."""
    machine = SimpleNamespace(available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return FakeProc(tmp_path)


def test_without_a_limit_it_is_what_the_machine_has(proc: FakeProc) -> None:
    proc.place("/a")
    write(proc.mount("cgroup") / "a", memory_max="max", memory_high="max", memory_current=30 * GIB)
    free = free_memory(proc.proc)
    assert free == FreeMemory(40 * GIB)
    assert str(free) == "40.0 GiB are free"


def test_a_limit_of_version_2_leaves_what_is_not_in_use(proc: FakeProc) -> None:
    """Files that were read and nobody has mapped make room; 1.5 GiB of them, and 0.25 that are mapped."""
    stat = f"anon {GIB // 4}\ninactive_file {GIB}\nactive_file {3 * GIB // 4}\nfile_mapped {GIB // 4}"
    proc.place("/box")
    write(proc.mount("cgroup") / "box", memory_max=2 * GIB, memory_current=2 * GIB, memory_stat=stat)
    free = free_memory(proc.proc)
    assert free == FreeMemory(3 * GIB // 2, 2 * GIB, "its control group")
    assert str(free) == "1.5 GiB are free (limited to 2.0 GiB by its control group)"


@pytest.mark.parametrize(("inner", "outer", "limit"), [(8, 3, 3), (2, 5, 2), ("max", 6, 6)])
def test_the_tightest_of_all_groups_around_it_counts(
    proc: FakeProc, inner: object, outer: int, limit: int
) -> None:
    proc.place("/pod/box")
    tree = proc.mount("cgroup")
    size = inner if isinstance(inner, str) else int(str(inner)) * GIB
    write(tree / "pod" / "box", memory_max=size, memory_current=0)
    write(tree / "pod", memory_max=outer * GIB, memory_current=0)
    assert free_memory(proc.proc).limit_bytes == limit * GIB


def test_what_a_group_is_slowed_down_at_is_a_limit_too(proc: FakeProc) -> None:
    proc.place("/box")
    write(proc.mount("cgroup") / "box", memory_max=8 * GIB, memory_high=4 * GIB, memory_current=GIB)
    assert free_memory(proc.proc) == FreeMemory(3 * GIB, 4 * GIB, "its control group")


def test_a_neighbour_in_the_same_group_takes_from_it(proc: FakeProc) -> None:
    proc.place("/pod/box")
    tree = proc.mount("cgroup")
    write(tree / "pod" / "box", memory_max=8 * GIB, memory_current=GIB)
    write(tree / "pod", memory_max=9 * GIB, memory_current=8 * GIB)
    assert free_memory(proc.proc) == FreeMemory(GIB, 9 * GIB, "its control group")


def test_a_limit_of_version_1_counts_and_its_word_for_none_does_not(proc: FakeProc) -> None:
    none = 9223372036854771712
    stat = f"hierarchical_memory_limit {3 * GIB}\ntotal_inactive_file {GIB}\ntotal_mapped_file {GIB // 2}"
    proc.place("/box", "memory")
    tree = proc.mount("memory", controllers="memory")
    write(tree, memory_limit_in_bytes=none, memory_usage_in_bytes=20 * GIB)
    write(tree / "box", memory_limit_in_bytes=4 * GIB, memory_usage_in_bytes=2 * GIB, memory_stat=stat)
    # The container does not see the group around it that has the limit of 3 GiB.
    assert free_memory(proc.proc) == FreeMemory(3 * GIB // 2, 3 * GIB, "its control group")


def test_a_group_beyond_its_limit_leaves_nothing(proc: FakeProc) -> None:
    proc.place("/box")
    write(proc.mount("cgroup") / "box", memory_max=GIB, memory_current=2 * GIB, memory_stat="file 5")
    assert free_memory(proc.proc).bytes == 0


def in_a_process(setup: str, prefix: list[str] | None = None) -> dict[str, object]:
    """What a process of its own finds after `setup`."""
    script = (
        f"{setup}\nimport json\nfrom p2pinfer.models.machine.memory import free_memory\n"
        "free = free_memory()\n"
        "print(json.dumps([free.bytes, free.limit_bytes, free.limited_by]))"
    )
    done = subprocess.run(
        [*(prefix or []), sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    return dict(zip(("bytes", "limit", "by"), found, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are measured on Linux")
@pytest.mark.parametrize(("name", "said"), [("RLIMIT_AS", "ulimit -v"), ("RLIMIT_DATA", "ulimit -d")])
def test_a_limit_of_the_process_leaves_what_it_has_not_taken(name: str, said: str) -> None:
    limit = min(psutil.virtual_memory().available // 2, 12 * GIB)
    found = in_a_process(f"import resource; resource.setrlimit(resource.{name}, ({limit}, {limit}))")
    assert (found["limit"], found["by"]) == (limit, said)
    assert 0 < int(str(found["bytes"])) < limit


def make_group(tree: Path, limit: str) -> Path | None:
    """A control group with a limit of 1 GiB, if this is a tree of those and we may."""
    group = tree / f"p2pinfer-test-{os.getpid()}"
    if not (tree / "cgroup.procs").is_file():
        return None
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        assert (group / limit).is_file()
        (group / limit).write_text(str(GIB))
    except (AssertionError, OSError):  # the controller is not handed on to this group
        group.rmdir()
        return None
    return group


@pytest.fixture
def real_group() -> Generator[Path]:
    group = make_group(Path("/sys/fs/cgroup"), "memory.max") or make_group(
        Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    )
    if group is None:
        pytest.skip("no control group with a memory limit can be made here")
    yield group
    group.rmdir()


@pytest.mark.slow
def test_in_a_control_group_of_the_kernels_its_limit_is_found(real_group: Path) -> None:
    enter = f'echo $$ > "{real_group}/cgroup.procs"; exec "$@"'
    found = in_a_process("", ["/bin/sh", "-c", enter, "sh"])
    assert (found["limit"], found["by"]) == (GIB, "its control group")
    assert 0 < int(str(found["bytes"])) < GIB


def test_a_card_has_what_is_free_and_what_torch_keeps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that were given up for others lie in torch's own pool, which the driver does not call free."""

    def mem_get_info(_device: torch.device) -> tuple[int, int]:
        return 5 * GIB, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)

    def reserved(_device: torch.device) -> int:
        return 9 * GIB

    def allocated(_device: torch.device) -> int:
        return 2 * GIB

    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    assert free_on_card(torch.device("cuda", 0)) == FreeMemory(12 * GIB)


@pytest.mark.parametrize(
    "exc",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        CheckpointError("model.safetensors: Cannot allocate memory (os error 12)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_way_to_refuse_memory_is_said_in_a_line(exc: Exception) -> None:
    with (
        pytest.raises(OutOfMemory, match=r"no memory for blocks 0:9 on cpu: .* GiB are free.*; serve fewer"),
        refusals_named("blocks 0:9", [CPU], "serve fewer"),
    ):
        raise exc


def test_a_card_that_refuses_even_the_question_has_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where many nodes begin on it at once; the sentence of the refusal asks as well."""
    card = torch.device("cuda", 0)

    def refuse(_device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert free_on_card(card) == FreeMemory(0)
    with (
        pytest.raises(OutOfMemory, match=r"no memory for blocks 0:9 on cuda:0: 0\.0 GiB are free; serve"),
        refusals_named("blocks 0:9", [card], "serve fewer"),
    ):
        raise RuntimeError("CUDA error: out of memory")

    def break_down(_device: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", break_down)
    with pytest.raises(RuntimeError, match="assert"):
        free_on_card(card)


def test_other_errors_stay_what_they_are() -> None:
    for exc in (OSError(errno.ENOENT, "no such file"), RuntimeError("shapes differ"), KeyError("q")):
        assert not is_refusal(exc)
        with pytest.raises(type(exc)), refusals_named("blocks 0:9", [CPU], "serve fewer"):
            raise exc


def test_torch_says_it_in_words_that_are_known() -> None:
    with pytest.raises(OutOfMemory), refusals_named("a tensor", [CPU], "ask for less"):
        torch.empty(1 << 60, dtype=torch.uint8)
