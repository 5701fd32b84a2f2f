"""Backlog of audits: what waits, bounded, and what of it outlives the process.

    session closes -> receipts checked -> a job for each hop that the coin chose -> kept on disk -> audited
                                                                 jobs of earlier processes -----^

Sessions are dropped rather than waited for when there are too many: a client that generates faster than it
audits would end up holding the tensors of all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import trio

from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.protocol.draws import Draw
from p2pinfer.session.receipt_checks import PassedStep, ReceiptBook

from .kept_jobs import JobFolder, KeptJob

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_WAITING: Final = 64  # audits; what comes on top is not checked
MAX_WAITING_BYTES: Final = 256 << 20  # that their sessions sent and got


@dataclass(frozen=True, slots=True)
class Job:
    """A hop to be audited.

    Attributes:
        steps: Of its session. What is checked of them is checked again when the evidence is collected.
        contradiction: Two receipts for one step that the hop signed; then nothing else is looked at.
        fault: What is wrong with a receipt of its, which ended the session.
        is_fresh: True if the session ended in this process.
        was_slow: True if the hop kept an earlier process waiting for its evidence.
        path: Its file, if it is kept.
        draw: Terms of draws at the last hop; None: none were drawn there.
    """

    peer_id: str
    steps: tuple[PassedStep, ...] = ()
    contradiction: tuple[bytes, ...] = ()
    fault: str = ""
    is_fresh: bool = True
    was_slow: bool = False
    path: Path | None = None
    draw: Draw | None = None

    @property
    def size(self) -> int:
        """Bytes that it keeps in memory; hops of one session share them, and each counts them."""
        return sum(len(each.sent) + len(each.got) for each in self.steps)

    @property
    def others(self) -> tuple[str, ...]:
        """Other peers that had to do with the session."""
        return tuple({hop.peer_id for each in self.steps for hop in each.hops})


@dataclass(frozen=True, slots=True)
class ClosedSession:
    """A session that is over, the hops that the coins chose, and whether its broken receipt was told of."""

    book: ReceiptBook
    chosen: frozenset[str]
    was_told: bool


class Backlog:
    """Audits that wait for a worker.

    Args:
        folder: Where they are kept until they are done; None if nobody wants them kept.
        clock: The wall clock, seconds.
    """

    def __init__(self, folder: JobFolder | None, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._clock = clock
        self._disk = trio.Lock()
        self._takes_over = True
        self._waiting_bytes = 0
        self._pending = 0
        self._settled = Pulse()
        self._slow: dict[Path, Path] = {}  # other names of the files of jobs whose hops keep us waiting
        self._jobs_in, self._jobs = trio.open_memory_channel[Job](MAX_WAITING)

    # ------------------------------------------------------------------ in

    async def put(self, job: Job) -> None:
        """Queue a job, after it has been written where it outlives this process."""
        path = None
        if job.steps and not job.contradiction and self._has_room(job):
            kept = KeptJob(job.peer_id, self._clock(), job.steps, draw=job.draw)
            path = await self._on_disk(lambda folder: folder.keep(kept))
        self._queue(replace(job, path=path))

    async def take_over(self) -> None:
        """Queue what earlier processes have left."""
        if not self._takes_over:
            return
        now = self._clock()
        for path, kept in await self._on_disk(lambda folder: folder.take_over(now)) or []:
            logger.debug("audit.left_over peer=%s", kept.peer_id)
            left = Job(
                kept.peer_id, kept.steps, is_fresh=False, was_slow=kept.was_slow, path=path, draw=kept.draw
            )
            self._queue(left)

    def _has_room(self, job: Job) -> bool:
        waiting = self._jobs_in.statistics().current_buffer_used
        return waiting < MAX_WAITING and self._waiting_bytes + job.size <= MAX_WAITING_BYTES

    def _queue(self, job: Job) -> None:
        if not self._has_room(job):
            logger.debug("audit.dropped peer=%s", job.peer_id)
            return
        self._jobs_in.send_nowait(job)
        self._waiting_bytes += job.size
        self.note_pending(1)

    # ------------------------------------------------------------------ out

    async def next_job(self) -> Job:
        """The job that waits longest; each goes to one of those that ask, who call `done` after it."""
        return await self._jobs.receive()

    async def note_slow(self, job: Job) -> None:
        """Note for the next process, if there will be one, that a job's hop keeps this one waiting."""
        path = job.path
        if path is not None and (marked := await self._on_disk(lambda folder: folder.mark_slow(path))):
            self._slow[path] = marked

    async def done(self, job: Job, *, keep: bool = False) -> None:
        """Forget a job, with whatever result; with `keep`, the next process finds it all the same."""
        self._waiting_bytes -= job.size
        try:
            path = job.path
            if path is not None:
                path = self._slow.pop(path, path)
                if not keep:
                    await self._on_disk(lambda folder: folder.drop(path))
        finally:
            self.note_pending(-1)

    def note_pending(self, more: int) -> None:
        """Count what has to be finished before everything is settled."""
        self._pending += more
        if not self._pending:
            self._settled.fire()

    async def settled(self) -> None:
        """Wait until nothing is pending."""
        while self._pending:
            await self._settled.wait()

    # ------------------------------------------------------------------ the folder

    async def close(self, *, forget: bool = False) -> None:
        """Leave what is not done to the next process; nothing is kept from now on.

        Args:
            forget: Leave only what earlier processes have left. None of it is done here any more.
        """
        self._takes_over = not forget
        await self._on_disk(lambda folder: folder.close(forget=forget))
        self._folder = None

    def is_wanted(self, job: Job) -> bool:
        """True if a job is still to be done by this process."""
        return job.is_fresh or self._takes_over

    async def _on_disk(self, work: Callable[[JobFolder], _T]) -> _T | None:
        """Result of `work`; None if nothing is kept, or the disk will not have it, which is told once."""
        async with self._disk:
            folder = self._folder
            if folder is None:
                return None
            try:
                return await trio.to_thread.run_sync(work, folder)
            except (OSError, NotImplementedError) as exc:  # the second where files cannot be locked
                logger.warning("audits cannot be kept for the next start: %s", exc)
                self._folder = None
                return None


def beginning_of(steps: Sequence[PassedStep], max_tokens: int, max_bytes: int) -> tuple[PassedStep, ...]:
    """The steps, without the payloads of those that lie beyond what an audit looks at.

    Or nothing of a session would be audited that is so long that there is no room for all of it. The receipts
    of later steps are needed: they may roll back earlier ones.
    """
    kept: list[PassedStep] = []
    size = 0
    for each in steps:
        size += len(each.sent) + len(each.got)
        is_beyond = each.step.position >= max_tokens or size > max_bytes
        kept.append(each._replace(sent=b"", got=b"") if is_beyond else each)
    return tuple(kept)


@contextmanager
def contained(what: str) -> Generator[None]:
    """Log an error of ours and go on: what a stranger sent must not end a client or a node."""
    try:
        yield
    except Exception:
        logger.exception("%s could not be checked, for an error of our own", what)
