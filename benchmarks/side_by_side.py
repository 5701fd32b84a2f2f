"""Commands that run beside each other, some at a time, whose results are taken in as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

LAST_CHARACTERS = 1000  # of what a job that failed has said, that are shown


@dataclass(frozen=True, slots=True)
class Job:
    """A command, by a name that tells it from the others.

    Attributes:
        env: Of the process; None is this process's.
        waits_for: Names of jobs that have to be over first.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] | None = field(default=None, hash=False)
    waits_for: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """What a job said on standard output; empty if it failed or ran out of time."""

    name: str
    said: bytes
    seconds: float


async def run_all(
    jobs: Sequence[Job],
    at_once: int,
    on_done: Callable[[Done], None],
    *,
    logs: Path,
    limit_s: float = float("inf"),
) -> None:
    """Run the jobs, the first ones first.

    Args:
        at_once: Processes that run beside each other; each may start more of its own.
        on_done: Called with each job as it ends.
        logs: Folder for their standard errors, one file each.
        limit_s: After so long those that run are ended and the others are not begun.
    """
    logs.mkdir(parents=True, exist_ok=True)
    over = {job.name: trio.Event() for job in jobs}
    places = trio.Semaphore(at_once)

    async def run(job: Job) -> None:
        for name in job.waits_for:
            await over[name].wait()
        async with places:
            started = trio.current_time()
            with (logs / f"{_file_name(job.name)}.log").open("wb") as log:
                ran = await trio.run_process(
                    job.command, capture_stdout=True, check=False, env=job.env, stderr=log
                )
        if ran.returncode:
            last = Path(log.name).read_text(encoding="utf-8", errors="replace")[-LAST_CHARACTERS:]
            print(f"{job.name}: exit code {ran.returncode}, see {log.name}: ...{last}", file=sys.stderr)
        on_done(Done(job.name, b"" if ran.returncode else ran.stdout, trio.current_time() - started))
        over[job.name].set()

    with trio.move_on_after(limit_s) as limit:
        async with trio.open_nursery() as nursery:
            for job in jobs:
                nursery.start_soon(run, job)
    if limit.cancelled_caught:
        missing = ", ".join(name for name, event in over.items() if not event.is_set())
        print(f"out of time after {limit_s:.0f} s; not done: {missing}", file=sys.stderr)


def python(script: Path, *words: str) -> tuple[str, ...]:
    """The command that runs a script with this interpreter."""
    return (sys.executable, str(script), *words)


def _file_name(name: str) -> str:
    return "".join(each if each.isalnum() or each in "-." else "_" for each in name)
