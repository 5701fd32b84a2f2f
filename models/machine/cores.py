"""Processor cores that this process may use, which may be fewer than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

from .control_groups import PROC, ControlGroup, control_groups


def usable_cores(proc: Path = PROC) -> int:
    """Number of cores that may compute for this process at once: 1 or more.

    A process may be bound to some of them (taskset, a cpuset), or be given a share of their time by its
    control group or one around it. A share of two and a half cores is two: a third thread would use up the
    share of the others while it waits for them.

    Args:
        proc: The process's folder in /proc.
    """
    cores = float(_bound_to())
    for group in control_groups("cpu", proc):
        if (share := _share(group)) is not None:
            cores = min(cores, share)
    return max(1, int(cores))


def _bound_to() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # pragma: no cover - macOS and Windows


def _share(group: ControlGroup) -> float | None:
    """A group's time on the processor, in cores; None if it is not limited."""
    if group.version == 2:
        quota, period = [*group.text("cpu.max").split(), "", ""][:2]
    else:
        quota, period = group.text("cpu.cfs_quota_us").strip(), group.text("cpu.cfs_period_us").strip()
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)
