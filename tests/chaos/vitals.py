"""What a process holds: memory, threads, descriptors from outside; tasks, streams, sessions from inside.

A process that called `install` writes what it knows of itself into a file whenever it gets a SIGUSR2. Nothing
in it runs for this purpose, so nothing that is measured is there because of the measuring.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import trio

ANSWER_S = 20.0  # a frozen or very busy process answers late

# What a process may hold more than before after a run of chaos; memory than at half-time, when caches of
# ended sessions, evidence and oneDNN's kernels have filled. Connections come and go: eight tasks each, two
# more while one is set up.
MORE_MIB = 96.0
MORE_PER_CONNECTION = 10
MORE_THREADS = 2


@dataclass(frozen=True)
class Vitals:
    """One process at one moment."""

    rss_mib: float
    threads: int
    descriptors: int
    tasks: int
    connections: int
    streams: int
    sessions: int
    doing: Mapping[str, int] = field(default_factory=dict[str, int], repr=False)  # tasks by what they run

    def more_doing(self, before: Vitals) -> dict[str, int]:
        """The tasks that were not there before."""
        more = {name: count - before.doing.get(name, 0) for name, count in self.doing.items()}
        return {name: count for name, count in more.items() if count > 0}

    def excess(self, before: Vitals) -> dict[str, float]:
        """How much more it holds than before, of what it holds too much more of."""
        more = max(0, self.connections - before.connections)
        allowed = {
            "rss_mib": MORE_MIB,
            "threads": MORE_THREADS,
            "descriptors": more + 1,
            "tasks": MORE_PER_CONNECTION * (more + 1),
            "streams": MORE_PER_CONNECTION * (more + 1),
            "sessions": 0,
        }
        grown = {what: getattr(self, what) - getattr(before, what) for what in allowed}
        return {what: each for what, each in grown.items() if each > allowed[what]}


def install(path: Path) -> None:
    """Answer every SIGUSR2 from now on; in the main thread, before trio runs."""

    def answer(signum: int, frame: FrameType | None) -> None:
        _write(path)

    signal.signal(signal.SIGUSR2, answer)


def read_vitals(pid: int, path: Path) -> Vitals:
    """Those of the process `pid`, which has `install`ed `path`.

    Raises:
        TimeoutError: It does not answer.
    """
    path.unlink(missing_ok=True)
    process = psutil.Process(pid)
    process.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + ANSWER_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not say how it is")
        time.sleep(0.05)
    inside = json.loads(path.read_text(encoding="ascii"))
    with process.oneshot():
        return Vitals(
            rss_mib=round(resident_mib(pid), 1),
            threads=process.num_threads(),
            descriptors=process.num_fds(),
            **inside,
        )


def resident_mib(pid: int) -> float:
    """What of a process is in memory."""
    return float(psutil.Process(pid).memory_info().rss) / (1 << 20)


def describe(vitals: Vitals) -> str:
    """On one line."""
    return ", ".join(f"{name} {value}" for name, value in asdict(vitals).items() if name != "doing")


def _write(path: Path) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(_inside()), encoding="ascii")
    draft.replace(path)


def _inside() -> dict[str, Any]:
    gc.collect()
    yamux: Any = sys.modules["p2pinfer.node.transport.yamux"]
    server: Any = sys.modules.get("p2pinfer.node.serve.server")
    connections = streams = sessions = 0
    for each in gc.get_objects():
        # By its type: to ask some of these objects for their class would wake them up.
        if issubclass(type(each), yamux.YamuxConnection) and not each.is_closed:
            connections += 1
            streams += len(each._streams)
        elif server is not None and type(each) is server.SpanServer:
            sessions += each.sessions
    doing = Counter(_task_names(trio.lowlevel.current_root_task()))
    return {
        "tasks": doing.total(),
        "connections": connections,
        "streams": streams,
        "sessions": sessions,
        "doing": doing,
    }


def _task_names(task: trio.lowlevel.Task | None) -> Iterator[str]:
    if task is not None:
        yield task.name
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                yield from _task_names(child)
