"""Weight files brought from several peers at once, each chunk checked, each file checked as a whole.

For each file, peers are asked for their list of chunks, and those with the same list bring it together. Who
sends something else than its own list says, over an authenticated stream, has lied. When the file is whole
and has not the hash that the revision names, the list was false, and with it everybody who gave it: each of
its chunks was as the list said. Then the next list has its turn. An honest peer hashes a file as a whole
before it gives a list, and each chunk before it sends it, so neither happens to it.

Peers of the local network come first; others are asked when none of those is left. What has come stays on the
disk, and the next run goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import trio

from p2pinfer.errors import CheckpointError, ModelNotFound, PeerError, ProtocolViolation
from p2pinfer.models.checkpoint.hashes import FileHash, hash_files, hash_stream, remember_hash
from p2pinfer.models.pieces.chunks import ChunkList, remember_chunks
from p2pinfer.models.pieces.manifest import WeightFile
from p2pinfer.models.pieces.partial_file import NotHere, PartialFile
from p2pinfer.models.progress import Progress, Silent
from p2pinfer.node.concurrency.nurseries import bare_errors
from p2pinfer.node.host.network import Network
from p2pinfer.node.transport.addresses import parse_tcp

from .accounts import Accounts, Brought, OnLie
from .asking import Come, open_asking
from .config import WeightsConfig
from .file_job import MAX_LIES, FileJob, Source
from .peer_work import FileWork, PeerWork
from .plain_copy import Budget
from .room import lacks_room
from .weights_server import is_near_address

logger = logging.getLogger(__name__)

MAX_SOURCES: Final = 24  # peers that are asked about one file
AT_ONCE: Final = 8  # of them that bring it
LOOK_AGAIN_S: Final = 5.0  # before the swarm is looked at for more of them, and a lost one is tried again
OTHERS_S: Final = 2.0  # that others have to give a list, once somebody has
MAKING_S: Final = 300.0  # how long a peer may take to hash a file for its list

Find = Callable[[], Awaitable[Sequence[Source]]]


class WeightsFetch:
    """Brings files of one model from peers."""

    def __init__(
        self,
        host: Network,
        config: WeightsConfig,
        cache_dir: Path,
        find: Find,
        on_lie: OnLie = lambda peer_id, why, is_certain: None,
        *,
        weights_bytes: int = 0,
        is_private: bool = False,
    ) -> None:
        """
        Args:
            weights_bytes: Disk that all downloaded models may take; 0: whatever is free.
            find: Gives the peers that may have some of it, as far as they are known at the moment.
            on_lie: See `Accounts`.
            is_private: This is a swarm with a key, in which nothing travels in the clear.
        """
        self._accounts = Accounts(on_lie)
        self._host = host
        self._config = config
        self._cache_dir = cache_dir
        self._find = find
        self._weights_bytes = weights_bytes
        self._sources: dict[str, Source] = {}
        self._work = PeerWork(
            host,
            self._accounts,
            Budget(config.download_bytes_per_s),
            plain=config.plain and not is_private,
            patience_s=config.patience_s,
        )

    @property
    def brought(self) -> Brought:
        """Bytes and lies, by peer."""
        return self._accounts.brought

    async def bring(
        self,
        files: Sequence[WeightFile],
        folder: Path,
        *,
        label: str = "fetching from peers",
        near_only: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Have `files` in `folder`, whole and right.

        Args:
            near_only: Ask nobody beyond the local network, and do not wait for anybody to come.

        Raises:
            ModelNotFound: Nobody gave what is missing, for as long as the settings say.
            CheckpointError: The disk refuses.
        """
        self._accounts.progress = progress or Silent()
        self._accounts.progress.start(label, sum(each.size for each in files))
        try:
            with bare_errors():
                for file in files:
                    await self._bring(file, folder / file.name, near_only)
        finally:
            self._accounts.progress.done()

    # ------------------------------------------------------------------ one file

    async def _bring(self, file: WeightFile, path: Path, near_only: bool) -> None:
        since, refuted, too_large = trio.current_time(), set[ChunkList](), ""
        while True:
            givers = await self._givers(file, near_only)
            groups = {chunks: sources for chunks, sources in givers.items() if chunks not in refuted}
            if groups:
                chunks = max(groups, key=lambda each: _worth(groups[each]))
                # A size is a peer's word too, so one that is too large rules out its list and no other.
                too_large = await trio.to_thread.run_sync(
                    lacks_room, path, chunks.size, self._cache_dir, self._weights_bytes
                )
                if too_large:
                    refuted.add(chunks)
                    continue
                hashed = await self._bring_by(file, path, chunks, groups[chunks])
                if hashed is not None and await self._is_right(file, path, chunks, groups[chunks], hashed):
                    return
                if hashed is not None:
                    refuted.add(chunks)
                    continue
            if too_large:
                raise CheckpointError(too_large)
            if near_only or trio.current_time() - since > self._config.patience_s:
                raise ModelNotFound(
                    f"no peer gives {file.name} (SHA-256 {file.sha256[:16]}...){self._said()}; what has come "
                    "is kept: start again when a node that has the model is there"
                )
            await trio.sleep(min(LOOK_AGAIN_S, self._config.patience_s))

    def _said(self) -> str:
        liars = self._accounts.brought.liars
        return "".join(f"; {peer_id} {why}" for peer_id, why in liars.items())

    async def _givers(self, file: WeightFile, near_only: bool) -> dict[ChunkList, list[Source]]:
        """Peers that have the file, by the list of its chunks that they give."""
        for source in await self._find():
            self._sources.setdefault(source.peer_id, source)
        asked = [each for each in self._sources.values() if not each.is_over]
        if near_only:  # nobody is dialled who can only be far away
            asked = [each for each in asked if each.is_near or any(map(_may_be_near, each.addrs))]
        asked = asked[:MAX_SOURCES]
        givers: dict[ChunkList, list[Source]] = {}
        limiter, answered = trio.CapacityLimiter(AT_ONCE), trio.Event()

        async def ask(source: Source) -> None:
            async with limiter:
                chunks = await self._list_of(source, file)
            if chunks is not None and (source.is_near or not near_only):
                givers.setdefault(chunks, []).append(source)
                answered.set()

        async def ask_all() -> None:
            async with trio.open_nursery() as asking:
                for source in asked:
                    asking.start_soon(ask, source)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_all)
            await answered.wait()
            await trio.sleep(OTHERS_S)  # who says nothing, or has still to hash the file, is not waited for
            nursery.cancel_scope.cancel()
        return givers

    async def _list_of(self, source: Source, file: WeightFile) -> ChunkList | None:
        try:
            with trio.move_on_after(MAKING_S):
                async with open_asking(self._host, source) as asking:
                    while True:
                        try:
                            return await asking.chunks(bytes.fromhex(file.sha256))
                        except Come:
                            await trio.sleep(1.0)
        except ProtocolViolation as exc:
            self._accounts.give_up(source, exc)
        except PeerError as exc:
            logger.debug("weights.no_list peer=%s file=%s why=%s", source.peer_id, file.name, exc)
        return None

    async def _bring_by(
        self, file: WeightFile, path: Path, chunks: ChunkList, group: list[Source]
    ) -> FileHash | None:
        """The hashes of a file that came by one list; None if it is not whole when nobody is left."""
        partial_file = PartialFile(path, chunks)
        missing = await trio.to_thread.run_sync(partial_file.open)
        job = FileJob(chunks, missing)
        here = chunks.size - sum(map(chunks.bytes_of, missing))
        self._accounts.brought.resumed_bytes += here
        self._accounts.progress.advance(here)
        hashed: list[FileHash] = []
        whole = trio.Event()

        async def follow() -> None:
            """Hash the file while it comes, in order."""
            take = partial(_hash_following, partial_file)
            if (found := await trio.to_thread.run_sync(take, abandon_on_cancel=True)) is not None:
                hashed.append(found)
            whole.set()

        try:
            async with trio.open_nursery() as nursery:
                work = FileWork(file, job, partial_file)
                nursery.start_soon(self._heartbeat)
                nursery.start_soon(follow)
                chosen = [each for each in group if each.is_near] or group
                alive = [len(chosen[:AT_ONCE])]

                async def bring(source: Source) -> None:
                    await self._work.bring(source, work)
                    alive[0] -= 1
                    if not (alive[0] or job.done.is_set()):
                        nursery.cancel_scope.cancel()  # nobody is left

                for source in chosen[:AT_ONCE]:
                    nursery.start_soon(bring, source)
                await job.done.wait()
                await whole.wait()
                nursery.cancel_scope.cancel()
        finally:
            partial_file.close()
        return hashed[0] if hashed else None

    async def _heartbeat(self) -> None:
        while True:  # a bar that stands still has to be told so
            await trio.sleep(0.5)
            self._accounts.progress.advance(0)

    async def _is_right(
        self, file: WeightFile, path: Path, chunks: ChunkList, group: Sequence[Source], hashed: FileHash
    ) -> bool:
        """True if the whole file has the hash of the revision; else those who gave its list have lied."""
        partial_file = PartialFile(path, chunks)
        if hashed.sha256 == file.sha256:
            await trio.to_thread.run_sync(partial_file.finish)
            if hashed.tensors:  # else whoever loads it hashes it once more
                keep = partial(remember_hash, path, hashed, cache_dir=self._cache_dir)
                await trio.to_thread.run_sync(keep)
            await trio.to_thread.run_sync(remember_chunks, file.sha256, chunks, self._cache_dir)
            return True
        if await trio.to_thread.run_sync(partial_file.open):  # this disk was wrong, and no peer
            partial_file.close()
            raise CheckpointError(f"{partial_file.draft} changed while it was written; start again")
        partial_file.close()
        again = partial(hash_files, [partial_file.draft])
        if await trio.to_thread.run_sync(again, abandon_on_cancel=True) == [file.sha256]:
            await trio.to_thread.run_sync(partial_file.finish)  # this machine was wrong, and no peer
            return True
        await trio.to_thread.run_sync(partial_file.discard)
        self._accounts.progress.advance(-chunks.size)
        for source in group:
            source.lies = MAX_LIES
            self._accounts.note_lie(source, f"gave false hashes of the chunks of {file.name}")
        return False


def _hash_following(file: PartialFile) -> FileHash | None:
    try:
        return hash_stream(file.follow())
    except NotHere:
        return None


def _may_be_near(address: str) -> bool:
    try:
        return is_near_address((parse_tcp(address)[1], 0))
    except ValueError:  # a relay's, or a name
        return False


def _worth(group: Sequence[Source]) -> tuple[int, int, int]:
    """Order of lists: those of peers that have brought right bytes, of peers nearby, of many."""
    proved = sum(source.bytes > 0 and not source.lies for source in group)
    return proved, sum(source.is_near for source in group), len(group)
