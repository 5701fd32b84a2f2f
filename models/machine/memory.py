"""Memory that this process may still take: the least of what the machine and every limit leave.

A limit by control group counts the page cache of files that its processes have read. What nobody has mapped
of that makes room when room is needed, so it is free. What is mapped, the libraries that run, is not.
"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from p2pinfer.errors import OutOfMemory

from .control_groups import PROC, ControlGroup, control_groups

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # pragma: no cover - Windows has no such limits
    resource = None  # type: ignore[assignment]

# of free memory that weights may take; the rest is for cache, others and surprises
WEIGHTS_SHARE: Final = 0.6
_NO_LIMIT = 1 << 60  # version 1 of control groups writes "none" as a number that no machine has
_REFUSALS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "_alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, and those of CUDA's other libraries
)


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Memory that may still be taken, and its limit.

    Attributes:
        bytes: How much that is; 0 or more.
        limit_bytes: What this process and those it shares the limit with may have in all; None if it is the
            machine's memory that ends.
        limited_by: Who says so: "its control group", "ulimit -v"; empty for the machine's memory.
    """

    bytes: int
    limit_bytes: int | None = None
    limited_by: str = ""

    def __str__(self) -> str:
        """Words for it: `1.7 GiB are free (limited to 2.0 GiB by its control group)`."""
        said = f"{self.bytes / 2**30:.1f} GiB are free"
        if self.limit_bytes is not None:
            said += f" (limited to {self.limit_bytes / 2**30:.1f} GiB by {self.limited_by})"
        return said


def free_memory(proc: Path = PROC) -> FreeMemory:
    """Memory that this process may still take, and the limit that bounds it.

    Args:
        proc: The process's folder in /proc.
    """
    machine = FreeMemory(int(psutil.virtual_memory().available))
    return min((machine, *_by_groups(proc), *_by_process()), key=lambda free: free.bytes)


def free_on_card(device: torch.device) -> FreeMemory:
    """Memory of a GPU that this process may still take: the free part, and the unused part of torch's.

    None is left if not even the question can be put, which takes some hundred MiB the first time: many
    processes that begin on one card at once are refused there.
    """
    import torch  # here, since a client without weights asks for the machine's memory alone

    try:
        free, _total = torch.cuda.mem_get_info(device)
    except Exception as exc:  # torch's AcceleratorError, which older versions raise as RuntimeError
        if not is_refusal(exc):
            raise
        return FreeMemory(0)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FreeMemory(free + max(kept, 0))


def free_on(device: torch.device) -> FreeMemory:
    """Memory that may still be taken where a device computes."""
    return free_on_card(device) if device.type == "cuda" else free_memory()


@contextmanager
def refusals_named(what: str, devices: Iterable[torch.device], advice: str) -> Generator[None]:
    """Turn a refusal of memory within the block into an error that says for what, and what to do.

    Raises:
        OutOfMemory: Memory was refused.
    """
    try:
        yield
    except Exception as exc:  # a checkpoint that cannot be mapped is a CheckpointError
        if not is_refusal(exc):
            raise
        named = list(dict.fromkeys(devices))
        where, free = " and ".join(map(str, named)), " and ".join(str(free_on(each)) for each in named)
        raise OutOfMemory(f"no memory for {what} on {where}: {free}; {advice}") from exc


def is_refusal(exc: BaseException) -> bool:
    """True if an exception of Python's, torch's or a library's says that memory was refused."""
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return True
    if isinstance(exc, OSError):
        return exc.errno == errno.ENOMEM
    return any(words in str(exc).lower() for words in _REFUSALS)


def _by_groups(proc: Path) -> Iterator[FreeMemory]:
    """Memory that each control group with a limit leaves."""
    for group in control_groups("memory", proc):
        limit, used = _limit_and_use(group)
        if limit is not None and limit < _NO_LIMIT:
            yield FreeMemory(max(0, limit - used), limit, "its control group")


def _limit_and_use(group: ControlGroup) -> tuple[int | None, int]:
    """A group's limit, None if it has none, and the bytes in use that cannot be had back for the asking."""
    stat = group.table("memory.stat")
    if group.version == 2:
        # Above "high" processes are slowed down until they give back, which for weights means for ever.
        limits = [group.number("memory.max"), group.number("memory.high")]
        used, prefix, mapped = group.number("memory.current"), "", "file_mapped"
    else:
        # The second is the least of the groups around it, those that a container does not see among them.
        limits = [group.number("memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
        used, prefix, mapped = group.number("memory.usage_in_bytes"), "total_", "total_mapped_file"
    files = stat.get(prefix + "inactive_file", 0) + stat.get(prefix + "active_file", 0)
    unused = max(0, files - stat.get(mapped, 0))
    set_limits = [limit for limit in limits if limit is not None and limit >= 0]
    return min(set_limits, default=None), max(0, (used or 0) - unused)


def _by_process() -> Iterator[FreeMemory]:
    """Memory that the limits of `ulimit` leave; Linux does not enforce that on resident memory."""
    if resource is None:  # pragma: no cover - see above
        return
    memory = psutil.Process().memory_info()
    for name, used, said in (
        ("RLIMIT_AS", memory.vms, "ulimit -v"),
        ("RLIMIT_DATA", getattr(memory, "data", 0), "ulimit -d"),
    ):
        limit, _hard = resource.getrlimit(getattr(resource, name))
        if limit not in (resource.RLIM_INFINITY, -1) and limit < _NO_LIMIT:
            yield FreeMemory(max(0, limit - used), limit, said)
