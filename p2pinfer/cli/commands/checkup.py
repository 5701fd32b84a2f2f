"""Hardware report of this computer: torch, cores, memory, GPU, disk, and the models that fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from p2pinfer.errors import LocalError, P2PInferError
from p2pinfer.models.checkpoint.source import BUNDLED_MODEL, resolve_model
from p2pinfer.models.compute.target import choose_targets
from p2pinfer.models.config import ComputeConfig
from p2pinfer.models.configs.published_sizes import SHAPES
from p2pinfer.models.machine.cores import usable_cores
from p2pinfer.models.machine.memory import WEIGHTS_SHARE, free_memory, free_on_card
from p2pinfer.models.machine.split import blocks_that_fit, rooms_of

LEAST_DISK_BYTES: Final = 100 << 20  # below that not even notes and a small model have room
_NVIDIA: Final = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        wrong: It keeps this computer from serving or asking; the command's exit code says so.
        advice: What to do about it; empty if nothing is to be done.
    """

    name: str
    said: str
    wrong: bool = False
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """Part of a model that a node here would hold."""

    model: str
    blocks: int  # that fit
    of: int
    block_bytes: int

    def __str__(self) -> str:
        size = f"a block takes {self.block_bytes / 2**20:,.0f} MiB"
        if self.blocks == self.of:
            return f"all {self.of} blocks of {self.model} ({size})"
        return f"{self.blocks} of {self.of} blocks of {self.model} ({size})"


def check_torch() -> list[Finding]:
    """The build, and whether it computes."""
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    said = f"{torch.__version__} {build}, {usable_cores()} of {os.cpu_count()} cores for this process"
    right = bool((torch.ones(8, 8) @ torch.ones(8, 8) == 8).all())
    advice = "" if right else "matrix products are wrong: reinstall torch"
    return [Finding("torch", said, not right, advice)]


def check_card(driver: Path = _NVIDIA) -> list[Finding]:
    """The cards that torch can use, and one that it cannot."""
    if torch.cuda.is_available():
        cards = range(torch.cuda.device_count())
        free = (f"{torch.cuda.get_device_name(card)}: {free_on_card(_card(card))}" for card in cards)
        return [Finding("card", said) for said in free]
    if not driver.is_dir() or not any(driver.iterdir()):
        return [Finding("card", "no NVIDIA card; blocks are computed on the CPU")]
    why = "its driver is too old or not loaded" if torch.version.cuda else "torch is a CPU build"
    how = (
        "update the driver"
        if torch.version.cuda
        else "install torch from the default index, not from the CPU index"
    )
    return [Finding("card", f"torch cannot use the NVIDIA card: {why}", True, how)]


def check_memory() -> list[Finding]:
    """Memory that this process may have, whatever the machine has."""
    free = free_memory()
    smallest = min(SHAPES, key=lambda shape: shape.block_parameters)
    short = free.bytes * WEIGHTS_SHARE < smallest.block_parameters * 4
    advice = "free memory or raise the limit: a node does not fit" if short else ""
    return [Finding("memory", str(free), short, advice)]


def check_disk(data_dir: Path, cache_dir: Path) -> list[Finding]:
    """Room for notes and for downloaded models."""
    return [_disk("data disk", data_dir), _disk("cache disk", cache_dir)]


def fits(cache_dir: Path, compute: ComputeConfig | None = None) -> list[Fit]:
    """Number of blocks that a node here would hold, of the bundled model and of well-known ones."""
    compute = compute or ComputeConfig()
    spec = resolve_model(BUNDLED_MODEL, cache_dir=cache_dir).spec
    sizes = [(spec.model, spec.num_blocks, spec.block_parameters, spec.dtype)]
    sizes += [(shape.model, shape.blocks, shape.block_parameters, "bfloat16") for shape in SHAPES]
    found: list[Fit] = []
    for model, blocks, parameters, stored in sizes:
        targets = choose_targets(compute, stored)
        size = targets[0].numerics.weight_bytes(parameters)
        fitting = sum(blocks_that_fit(room, size) for room in rooms_of([target.device for target in targets]))
        found.append(Fit(model, min(blocks, fitting), blocks, size))
    return found


def check_all(data_dir: Path, cache_dir: Path, tell: Callable[[str], None]) -> Iterator[Finding]:
    """All of it; `tell` hears what comes next. A check that fails is a finding, not the end."""
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("torch", check_torch),
        ("card", check_card),
        ("memory", check_memory),
        ("disk", lambda: check_disk(data_dir, cache_dir)),
        ("which models fit", lambda: [Finding("model fit", str(each)) for each in fits(cache_dir)]),
    ]
    for name, check in checks:
        tell(name)
        try:
            yield from check()
        except (P2PInferError, OSError, RuntimeError) as exc:
            advice = "" if isinstance(exc, LocalError) else "run with -vv for more"
            yield Finding(name, f"check failed: {exc}", True, advice)


def _disk(name: str, folder: Path) -> Finding:
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    said = f"{free / 2**30:,.1f} GiB free in {folder}"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            name, said, True, f"{there} is not writable: choose another folder by --data-dir or cache_dir"
        )
    short = free < LEAST_DISK_BYTES
    return Finding(
        name, said, short, "free disk space: a node needs it for its state and downloads" if short else ""
    )


def _card(index: int) -> torch.device:
    return torch.device("cuda", index)
