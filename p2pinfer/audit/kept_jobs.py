"""Audits that outlive the process that owes them: a small folder beside the ledger.

A command that ends, or is killed, leaves the audits that it has not finished to the next one. Without that, a
hop would only have to be slower with its evidence than a command line is patient.

Theory of operation. Every process has a name and holds a lock on `<name>.lock`, of which the operating system
lets go when the process ends, however it ends. A job is one file, `<revision>-<name>-<number>.job`, written
aside and renamed, so that it is whole or not there. Who finds jobs whose owner's lock nobody holds renames
them to its own name. So no job is done twice at once, and none is lost between two owners.

Bounded in number, bytes and age: hops keep evidence for a quarter of an hour (docs/wire.md), and an audit
without evidence has no result. The files hold hidden states of the user's prompts, as saved texts do; only
the user may read them.

A hop may lose evidence before somebody else asks for it, and that is nobody's fault. But one that kept the
first process waiting has its job's file marked, by the end of its name: what it does not hand out to the next
one either is held against it. Or it would have to be slow with one and silent with the other, at no price.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
from filelock import FileLock, Timeout

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.node.protocol.messages import Step
from p2pinfer.routing.route import Hop
from p2pinfer.session.receipt_checks import PassedStep

from .collect import place_of

logger = logging.getLogger(__name__)

FOLDER: Final = "audits"  # in the data directory
MAX_JOBS: Final = 64
MAX_AGE_S: Final = 900.0
_AHEAD_S: Final = 60.0  # by which another process's clock may have been ahead
_SLOW: Final = "-slow.job"  # end of a file's name

_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class _Hop(msgspec.Struct, frozen=True, array_like=True):
    peer_id: _Id
    start: _Number
    stop: _Number
    addrs: tuple[str, ...]


class _Step(msgspec.Struct, frozen=True, array_like=True):
    """A step, the index of its route, the audited hop's receipt, and what this side has of the payloads."""

    number: _Number
    epoch: _Number
    position: _Number
    tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]
    returns: _Number
    route: _Number
    receipt: bytes
    sent: bytes
    got: bytes


class _KeptJob(msgspec.Struct, frozen=True, array_like=True):
    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    peer_id: _Id
    closed_at: float
    routes: tuple[tuple[_Hop, ...], ...]
    steps: tuple[_Step, ...]
    draw: Draw | None = None


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_KeptJob)


@dataclass(frozen=True, slots=True)
class KeptJob:
    """An audit that is still to be done.

    Attributes:
        closed_at: When its session ended, seconds of the wall clock.
        steps: Of the session, with the audited hop's receipts alone. None of it is checked.
        was_slow: True if the hop kept an earlier process waiting for its evidence.
        draw: Terms of draws at the last hop; None: none were drawn there.
    """

    peer_id: str
    closed_at: float
    steps: tuple[PassedStep, ...]
    was_slow: bool = False
    draw: Draw | None = None


class JobFolder:
    """Files of one process's audits. Everything here blocks on a disk: use a thread, one at a time.

    Args:
        folder: Made on first use.
        revision: Of the model; jobs of others are left alone.
        max_bytes: Of all jobs in the folder, whoever owes them.
    """

    def __init__(self, folder: Path, revision: str, max_bytes: int) -> None:
        self._folder = folder
        self._revision = revision[:16]
        self._max_bytes = max_bytes
        self._name = secrets.token_hex(8)
        self._number = 0
        self._own: set[Path] = set()  # jobs of this process's own sessions
        self._lock: FileLock | None = None

    def take_over(self, now: float) -> list[tuple[Path, KeptJob]]:
        """Jobs of processes that have ended, which are ours from now on; what is too old or damaged goes.

        Raises:
            OSError: The folder cannot be made or used.
        """
        self._open()
        owners = {path.stem.split("-")[1] for path in self._folder.glob("*-*-*")} - {self._name}
        return [job for owner in sorted(owners) for job in self._inherit(owner, now)]

    def keep(self, job: KeptJob) -> Path | None:
        """Write a job; None if there is no room for it even without the older ones.

        Raises:
            OSError: It cannot be written.
        """
        self._open()
        encoded = _encode(job)
        if len(encoded) > self._max_bytes:
            return None
        self._make_room(len(encoded))
        self._number += 1
        path = self._folder / f"{self._revision}-{self._name}-{self._number}.job"
        aside = path.with_suffix(".part")
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(encoded)
        aside.replace(path)
        self._own.add(path)
        return path

    def mark_slow(self, path: Path) -> Path:
        """Note that a job's hop keeps this process waiting; returns the file's new name.

        Raises:
            OSError: It cannot be renamed.
        """
        marked = path.with_name(path.name.removesuffix(_SLOW).removesuffix(".job") + _SLOW)
        with suppress(FileNotFoundError):  # another process may have needed its room
            path.replace(marked)
        if path in self._own:
            self._own.remove(path)
            self._own.add(marked)
        return marked

    def drop(self, path: Path) -> None:
        """Forget a job that is done."""
        path.unlink(missing_ok=True)
        self._own.discard(path)

    def close(self, *, forget: bool = False) -> None:
        """Leave the jobs that are still here to the next process; harmless twice.

        Args:
            forget: Remove those of this process, and leave only what it has taken over.
        """
        if self._lock is None:
            return
        for path in self._own if forget else ():
            path.unlink(missing_ok=True)
        lock, self._lock = self._lock, None
        lock.release()
        _remove(self._lock_of(self._name))

    def _open(self) -> None:
        if self._lock is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FileLock(self._lock_of(self._name), thread_local=False)
            lock.acquire(timeout=0)
            self._lock = lock

    def _lock_of(self, owner: str) -> Path:
        return self._folder / f"{owner}.lock"

    def _inherit(self, owner: str, now: float) -> list[tuple[Path, KeptJob]]:
        """Jobs of the process with this name, unless it lives."""
        jobs: list[tuple[Path, KeptJob]] = []
        try:
            with FileLock(self._lock_of(owner), timeout=0):
                for path in sorted(self._folder.glob(f"*-{owner}-*")):
                    if (job := _read(path, now)) is None:
                        path.unlink(missing_ok=True)
                    elif path.name.startswith(f"{self._revision}-"):
                        self._number += 1
                        end = _SLOW if job.was_slow else ".job"
                        ours = path.with_name(f"{self._revision}-{self._name}-{self._number}{end}")
                        path.replace(ours)
                        jobs.append((ours, job))
        except Timeout:
            return []
        _remove(self._lock_of(owner))
        return jobs

    def _make_room(self, needed: int) -> None:
        """Remove the oldest jobs, whoever owes them, until there is room for one more of so many bytes."""
        found = sorted(
            (path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.glob("*.job")
        )
        held = sum(size for _, size, _ in found)
        while found and (held + needed > self._max_bytes or len(found) >= MAX_JOBS):
            _, size, path = found.pop(0)
            held -= size
            path.unlink(missing_ok=True)


def job_folder(data_dir: Path | None, revision: str, max_bytes: int) -> JobFolder | None:
    """Folder of a data directory; None if there is none, or nothing may be kept."""
    return JobFolder(data_dir / FOLDER, revision, max_bytes) if data_dir and max_bytes else None


def _remove(lock: Path) -> None:
    """Remove the lock's file if nobody holds it just now; it is made again where it is wanted."""
    with suppress(OSError):
        lock.unlink(missing_ok=True)


def _encode(job: KeptJob) -> bytes:
    routes: dict[tuple[_Hop, ...], int] = {}
    steps: list[_Step] = []
    for passed in job.steps:
        index = place_of(passed, job.peer_id)
        if index is None or len(passed.receipts) != len(passed.hops):
            continue  # nothing that its audit looks at
        route = tuple(_Hop(hop.peer_id, hop.span.start, hop.span.stop, hop.addrs) for hop in passed.hops)
        step = passed.step
        steps.append(
            _Step(
                step.number,
                step.epoch,
                step.position,
                step.tokens,
                step.returns,
                routes.setdefault(route, len(routes)),
                passed.receipts[index],
                bytes(passed.sent) if index == 0 else b"",
                bytes(passed.got) if index == len(passed.hops) - 1 else b"",
            )
        )
    return _encoder.encode(_KeptJob(1, job.peer_id, job.closed_at, tuple(routes), tuple(steps), job.draw))


def _read(path: Path, now: float) -> KeptJob | None:
    """The job in a file; None if it is too old, damaged, or was never finished."""
    if path.suffix != ".job":
        return None
    try:
        kept = _decoder.decode(path.read_bytes())
        steps = tuple(_passed(kept, step) for step in kept.steps)
        job = KeptJob(kept.peer_id, kept.closed_at, steps, path.name.endswith(_SLOW), kept.draw)
    except (OSError, ValueError, LookupError, StopIteration, msgspec.MsgspecError) as exc:
        logger.warning("an audit that was left over cannot be read (%s): %s is removed", exc, path)
        return None
    return job if -_AHEAD_S <= now - job.closed_at <= MAX_AGE_S else None


def _passed(kept: _KeptJob, step: _Step) -> PassedStep:
    hops = tuple(
        Hop(each.peer_id, BlockSpan(each.start, each.stop), each.addrs) for each in kept.routes[step.route]
    )
    receipts = tuple(step.receipt if hop.peer_id == kept.peer_id else b"" for hop in hops)
    if step.receipt not in receipts:
        raise ValueError("a step that the peer had no part in")
    sent = Step(step.number, step.epoch, step.position, step.tokens, step.returns)
    return PassedStep(sent, hops, step.sent, step.got, receipts)
