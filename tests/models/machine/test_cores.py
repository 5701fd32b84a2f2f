from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2pinfer.models.machine.cores import usable_cores

from ..fake_proc import FakeProc, write


def bind(monkeypatch: pytest.MonkeyPatch, cores: set[int]) -> None:
    def sched_getaffinity(_pid: int) -> set[int]:
        return cores

    monkeypatch.setattr(os, "sched_getaffinity", sched_getaffinity, raising=False)


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProc:
    """A process that may run on twelve cores."""
    bind(monkeypatch, set(range(12)))
    return FakeProc(tmp_path)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 12),
        ("250000 100000", 2),  # docker run --cpus 2.5
        ("50000 100000", 1),
        ("3200000 100000", 12),
        ("100000 0", 12),
        ("", 12),
    ],
)
def test_a_share_of_the_processors_time_is_that_many_whole_cores(
    proc: FakeProc, quota: str, cores: int
) -> None:
    proc.place("/box")
    write(proc.mount("cgroup") / "box", cpu_max=quota)
    assert usable_cores(proc.proc) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 12), (400_000, 4), (10_000, 1)])
def test_version_1_says_it_in_two_files(proc: FakeProc, quota: int, cores: int) -> None:
    proc.place("/box", "cpu,cpuacct")
    tree = proc.mount("cpu", controllers="cpu,cpuacct")
    write(tree / "box", cpu_cfs_quota_us=quota, cpu_cfs_period_us=100_000)
    assert usable_cores(proc.proc) == cores


def test_the_least_share_of_the_groups_around_it_counts(proc: FakeProc) -> None:
    proc.place("/pod/box")
    tree = proc.mount("cgroup")
    write(tree / "pod" / "box", cpu_max="800000 100000")
    write(tree / "pod", cpu_max="300000 100000")
    assert usable_cores(proc.proc) == 3


def test_a_process_bound_to_some_cores_has_those(proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    bind(monkeypatch, {3, 7})
    proc.place("/")
    proc.mount("cgroup")
    assert usable_cores(proc.proc) == 2
