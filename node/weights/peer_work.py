"""Chunks of one file from one peer, over plain connections if it is nearby, and over a stream if not.

What comes over a stream is the peer's word, since only it can speak there. What comes over a plain connection
may be anybody's: a chunk that is wrong there is asked for again over a stream, and nobody is blamed for it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.models.pieces.manifest import WeightFile
from p2pinfer.models.pieces.partial_file import NotHere, PartialFile
from p2pinfer.node.host.network import Network

from .accounts import Accounts
from .asking import Asking, open_asking
from .file_job import FileJob, Source
from .plain_copy import Budget, PlainReceiver

logger = logging.getLogger(__name__)

_IN_FLIGHT: Final = 2  # requests of one stream
_LINES: Final = 2  # plain connections to one peer: while one is read and hashed, the other one sends


@dataclass(frozen=True, slots=True)
class FileWork:
    """A file that is being brought."""

    file: WeightFile
    job: FileJob
    partial_file: PartialFile

    def keep(self, index: int, content: bytes | memoryview) -> bool:
        """Write a chunk if it is right; False if not. For any thread."""
        if not self.job.chunks.has(index, content):
            return False
        self.partial_file.write(index, content)
        return True


class PeerWork:
    """Brings chunks from one peer after another, or from several at once."""

    def __init__(
        self, host: Network, accounts: Accounts, budget: Budget, *, plain: bool, patience_s: float
    ) -> None:
        """
        Args:
            budget: Bytes a second from all peers together.
            plain: Whether plain connections may be used.
            patience_s: How long nothing at all may come.
        """
        self._host = host
        self._accounts = accounts
        self._budget = budget
        self._plain = plain
        self._patience_s = patience_s

    async def bring(self, source: Source, work: FileWork) -> None:
        """Bring chunks from one peer until the file is whole, or the peer is of no more use."""
        job = work.job
        while not job.done.is_set() and not source.is_over:
            job.begin(source)
            try:
                if source.is_near and source.is_plain and self._plain:
                    source.is_plain = await self._bring_plain(source, work)
                    job.end(source)  # what was still to come over it is asked for again
                    job.begin(source)
                await self._bring_sealed(source, work)
            except ProtocolViolation as exc:
                self._accounts.give_up(source, exc)
            except PeerError as exc:
                logger.debug("weights.lost peer=%s file=%s why=%s", source.peer_id, work.file.name, exc)
            finally:
                job.end(source)
            source.failures += 1
            if trio.current_time() - job.came_at > self._patience_s or source.failures > 3:
                return
            await trio.sleep(source.failures * 0.5)

    async def _bring_sealed(self, source: Source, work: FileWork) -> None:
        """Over a stream of the swarm's: encrypted, authenticated, by whatever way there is."""
        job, sha256 = work.job, bytes.fromhex(work.file.sha256)
        async with open_asking(self._host, source) as asking:
            if await asking.chunks(sha256) != job.chunks:
                raise ProtocolViolation("gives another list of chunks than before", source.peer_id)
            asked: list[tuple[int, int]] = []
            while not job.done.is_set() and not source.is_over:
                while len(asked) < _IN_FLIGHT and (run := job.take(source)) is not None:
                    asked.append(run)
                    await asking.send_get(sha256, *run)
                if not asked:
                    with trio.move_on_after(1.0):  # somebody's chunk may be late by then
                        await job.changed.wait()
                    continue
                await self._receive(asking, source, work, *asked.pop(0))

    async def _receive(self, asking: Asking, source: Source, work: FileWork, first: int, count: int) -> None:
        job, chunks = work.job, work.job.chunks
        await asking.begin(sum(map(chunks.bytes_of, range(first, first + count))))
        for index in range(first, first + count):
            content = await asking.content(chunks.bytes_of(index))
            if not await trio.to_thread.run_sync(work.keep, index, content):
                job.note_wrong(source, index)
                self._accounts.note_lie(source, f"sent something else as chunk {index} of {work.file.name}")
                continue
            self._accounts.note_right(source, job, [index])
            await trio.sleep(self._budget.due_s(len(content)))

    async def _bring_plain(self, source: Source, work: FileWork) -> bool:
        """Over plain connections; False if there are none, or what comes over them is not right."""
        went_well: list[bool] = []

        async def bring() -> None:
            went_well.append(await self._bring_line(source, work))

        async with trio.open_nursery() as nursery:
            for _ in range(_LINES):
                nursery.start_soon(bring)
        return all(went_well)

    async def _bring_line(self, source: Source, work: FileWork) -> bool:
        try:
            async with open_asking(self._host, source) as asking:
                await asking.chunks(bytes.fromhex(work.file.sha256))
                door, remote = await asking.door(), asking.stream.remote_address
                if not door.port or remote is None:
                    return False
                receiver = PlainReceiver((remote[0], door.port), door.token)
                copy = partial(self._copy_plain, receiver, source, work)
                try:
                    return await trio.to_thread.run_sync(copy, abandon_on_cancel=True)
                finally:
                    receiver.close()
        except PeerError as exc:
            logger.debug("weights.no_line peer=%s why=%s", source.peer_id, exc)
            return False

    def _copy_plain(self, receiver: PlainReceiver, source: Source, work: FileWork) -> bool:
        """Work of a thread: ask, receive, check and write, a run of chunks at a time."""
        job, sha256 = work.job, bytes.fromhex(work.file.sha256)
        call = trio.from_thread.run_sync
        wrong: list[int] = []
        asked: list[tuple[int, int]] = []
        right: list[int] = []

        def take(index: int, content: memoryview) -> None:
            time.sleep(self._budget.due_s(len(content)))
            (right if work.keep(index, content) else wrong).append(index)

        try:
            receiver.connect()
            while not wrong:
                while len(asked) < _IN_FLIGHT and (run := call(job.take, source)) is not None:
                    asked.append(run)
                    receiver.ask(sha256, *run)
                if not asked:
                    break
                receiver.receive(job.chunks, *asked.pop(0), take)
                call(self._accounts.note_right, source, job, right[:])
                right.clear()
        except (OSError, PeerError, NotHere) as exc:
            logger.debug("weights.no_plain peer=%s why=%s", source.peer_id, exc)
            return False
        finally:
            receiver.close()
        if wrong:
            logger.info("a plain copy from %s is not right; asking again over its stream", source.peer_id)
        return not wrong
