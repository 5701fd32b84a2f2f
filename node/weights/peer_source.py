"""Models from the peers of a swarm: found by their revision, and brought as far as a span needs them.

A revision proves hashes and config, wherever they come from. It does not prove a tokenizer, so that is only
taken from peers where the name has an address for it too (`SwarmName.words`). That many peers announce a
revision proves nothing about what is in it: who names one has to have it from somebody they trust.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from p2pinfer.errors import CheckpointError, ModelNotFound, PeerError, ProtocolViolation
from p2pinfer.models.checkpoint.stored_model import (
    StoredModel,
    folder_of,
    open_stored,
    remember_manifest,
    wanted_texts,
)
from p2pinfer.models.pieces.manifest import CONFIG, Manifest, SwarmName, WeightFile
from p2pinfer.models.progress import Progress
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.reputation.ledger import open_ledger
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.routing.hearsay import in_turns

from .accounts import Brought
from .asking import open_asking
from .config import WeightsConfig
from .file_job import Source
from .weights_fetch import AT_ONCE, LOOK_AGAIN_S, MAX_SOURCES, WeightsFetch

logger = logging.getLogger(__name__)

SETTLE_S: Final = 10.0  # for the first peers to say whom they know


class PeerWeights:
    """Weights of one revision from the peers of a swarm."""

    def __init__(
        self,
        member: SwarmMember,
        revision: str,
        config: WeightsConfig,
        cache_dir: Path,
        data_dir: Path,
        *,
        weights_bytes: int = 0,
        is_private: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """`data_dir` has the ledger in which a proved lie is written down."""
        self._member = member
        self._revision = revision
        self._config = config
        self._cache_dir = cache_dir
        self._data_dir = data_dir
        self._progress = progress
        self._lies: list[tuple[str, str, bool]] = []
        self._banned = frozenset[str]()
        self._fetch = WeightsFetch(
            member.host,
            config,
            cache_dir,
            self.sources,
            lambda peer_id, why, is_certain: self._lies.append((peer_id, why, is_certain)),
            weights_bytes=weights_bytes,
            is_private=is_private,
        )

    @property
    def brought(self) -> Brought:
        """Bytes and lies, by peer."""
        return self._fetch.brought

    async def sources(self) -> Sequence[Source]:
        """Peers that announce the revision, in turns of those who told of them, banned ones left out."""
        left_out = {self._member.peer_id, *self._banned}
        others = [
            each for each in in_turns(self._member.hearsay(self._revision)) if each.peer_id not in left_out
        ]
        return [Source(each.peer_id, each.addrs) for each in others[:MAX_SOURCES]]

    async def find(self, name: SwarmName) -> StoredModel:
        """The model of this name, after its manifest and small files have come.

        Raises:
            ModelNotFound: No peer that has it was found in time.
            CheckpointError: It is there, and cannot be used here.
        """
        try:
            stored = await trio.to_thread.run_sync(lambda: open_stored(name, self._cache_dir))
            if not name.words or not _lacks_words(stored, name):
                return stored
        except (ModelNotFound, CheckpointError):
            pass
        await self._meet()
        since = trio.current_time()
        told: dict[str, str] = {}
        while True:
            sources = await self.sources()
            for start in range(0, len(sources), AT_ONCE):
                if await self._take_from_one_of(sources[start : start + AT_ONCE], name, told):
                    return await trio.to_thread.run_sync(lambda: open_stored(name, self._cache_dir))
            if trio.current_time() - since > self._config.patience_s:
                why = "; ".join(dict.fromkeys(list(told.values())[-3:])) or "no peer announces it"
                raise ModelNotFound(
                    f"no peer gives {name}: {why}. Start a node that has it, or check --bootstrap; "
                    "a node shares what its setting weights.share allows"
                )
            await trio.sleep(min(LOOK_AGAIN_S, self._config.patience_s))

    async def _take_from_one_of(
        self, sources: Sequence[Source], name: SwarmName, told: dict[str, str]
    ) -> bool:
        """Manifest and small files, of whoever gives them first; False if nobody does."""
        taken: list[tuple[Manifest, dict[str, bytes]]] = []

        async def take(source: Source) -> None:
            try:
                taken.append(await self._texts_of(source, name))
                nursery.cancel_scope.cancel()
            except (PeerError, CheckpointError) as exc:
                logger.debug("weights.no_manifest peer=%s why=%s", source.peer_id, exc)
                told[source.peer_id] = str(exc)

        async with trio.open_nursery() as nursery:
            for source in sources:
                nursery.start_soon(take, source)
        if not taken:
            return False
        manifest, texts = taken[0]
        await trio.to_thread.run_sync(_write_texts, manifest, texts, self._cache_dir)
        if manifest.is_gguf:  # whose config lies within
            folder = folder_of(self._revision, self._cache_dir)
            files = [each for each in manifest.weights if not (folder / each.name).exists()]
            await self.bring(files, folder, label=f"fetching {manifest.model} from peers")
        return True

    async def bring(
        self,
        files: Sequence[WeightFile],
        folder: Path,
        *,
        label: str,
        near_only: bool = False,
    ) -> None:
        """See `WeightsFetch.bring`. What peers lied about is in the ledger afterwards."""
        self._banned = await trio.to_thread.run_sync(self._read_bans)
        try:
            await self._fetch.bring(files, folder, label=label, near_only=near_only, progress=self._progress)
        finally:
            if self._lies:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._write_lies)

    async def _meet(self) -> None:
        await self._member.join(self._revision)
        await self._member.wait_settled(SETTLE_S)

    async def _texts_of(self, source: Source, name: SwarmName) -> tuple[Manifest, dict[str, bytes]]:
        async with open_asking(self._member.host, source) as asking:
            manifest, _ = await asking.manifest(self._revision)
            wanted = tuple(each for each in manifest.texts if each.name in wanted_texts(name))
            if name.words and manifest.words != name.words:
                raise CheckpointError(f"peer {source.peer_id} has another tokenizer, or none")
            texts = {each.name: await asking.small(each) for each in wanted}
        if not manifest.is_gguf:
            if CONFIG not in texts:
                raise CheckpointError(f"peer {source.peer_id} has no config.json of {name}")
            try:
                manifest.check_config(texts[CONFIG])
            except CheckpointError as exc:
                raise ProtocolViolation(str(exc), source.peer_id) from exc
        return Manifest(manifest.model, manifest.numbers, manifest.weights, wanted), texts

    def _read_bans(self) -> frozenset[str]:
        ledger = open_ledger(self._data_dir)
        try:
            return frozenset(
                peer_id for peer_id, account in ledger.peers().items() if account.ban is not None
            )
        finally:
            ledger.close()

    def _write_lies(self) -> None:
        ledger = open_ledger(self._data_dir)
        try:
            for peer_id, why, is_certain in self._lies:
                # Held against what the peer itself had said, over a connection that only it can speak on: as
                # sure as an output that was computed anew, once or twice.
                ledger.record_audit(peer_id, Verdict.FAIL, time.time(), confirmed=is_certain, why=why[:200])
            self._lies.clear()
        finally:
            ledger.close()


def _lacks_words(stored: StoredModel, name: SwarmName) -> bool:
    try:
        stored.fetch_words()
    except ModelNotFound:
        return True
    return False


def _write_texts(manifest: Manifest, texts: dict[str, bytes], cache_dir: Path) -> None:
    folder = remember_manifest(manifest, cache_dir)
    try:
        for name, content in texts.items():
            draft = folder / f".{name}.draft"
            draft.write_bytes(content)
            draft.replace(folder / name)
    except OSError as exc:
        raise CheckpointError(f"{folder} cannot be written: {exc.strerror}") from exc
