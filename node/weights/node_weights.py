"""Weights of a node: what it brings from peers before it loads a span, and gives them afterwards."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import trio

from p2pinfer.errors import CheckpointError, ModelNotFound
from p2pinfer.models.checkpoint.model_source import ModelSource
from p2pinfer.models.checkpoint.stored_model import StoredModel
from p2pinfer.models.pieces.manifest import SwarmName
from p2pinfer.models.progress import Progress
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import NodeConfig
from p2pinfer.node.swarm.membership import SwarmMember

from .config import WeightsConfig
from .peer_source import PeerWeights
from .weights_server import WeightsServer

logger = logging.getLogger(__name__)

MOST_ENDS_BYTES = 1 << 30  # of embedding and head, which a node also serves without


class NodeWeights:
    """Weights that a node takes from peers of its model, and gives them. Made by `lend_weights`."""

    def __init__(
        self,
        member: SwarmMember,
        config: WeightsConfig,
        cache_dir: Path,
        data_dir: Path,
        *,
        weights_bytes: int = 0,
        is_private: bool,
        progress: Progress | None = None,
    ) -> None:
        self._weights_bytes = weights_bytes
        self._member = member
        self._config = config
        self._folders = cache_dir, data_dir
        self._is_private = is_private
        self._progress = progress
        self._peers: PeerWeights | None = None
        self._server = WeightsServer(member.host, config, cache_dir, is_private=is_private)
        if config.share != "none":
            self._server.register()

    def close(self) -> None:
        """Give nothing any more."""
        if self._config.share != "none":
            self._server.unregister()

    async def find(self, name: SwarmName) -> StoredModel:
        """See `PeerWeights.find`."""
        return await self._of(name.revision).find(name)

    async def bring(self, source: ModelSource, span: BlockSpan) -> None:
        """Bring from peers what `span` lacks: all of it, or, of a model of the hub, what is nearby.

        Raises:
            ModelNotFound: It is no model of the hub, and no peer gives it.
            CheckpointError: The disk refuses.
        """
        is_stored = isinstance(source, StoredModel)
        if not (is_stored or self._config.take):
            return
        await self._bring(source, span, embedding_and_head=False, near_only=not is_stored)
        reaches_an_end = span.start == 0 or span.stop == source.spec.num_blocks
        few = source.missing_bytes(None, embedding_and_head=True) <= MOST_ENDS_BYTES
        if is_stored and reaches_an_end and few:
            try:
                await self._bring(source, None, embedding_and_head=True, near_only=False)
            except ModelNotFound as exc:
                logger.info("%s; this node serves without embedding and head", exc)

    async def bring_in_place_of_the_hub(self, source: ModelSource, span: BlockSpan) -> None:
        """Bring what the hub would not give, from peers wherever they are.

        Raises:
            ModelNotFound: No peer gives it either.
        """
        await self._bring(source, span, embedding_and_head=False, near_only=False)

    async def share(self, source: ModelSource) -> None:
        """Give peers what is here of a model, as far as the settings allow."""
        if self._config.share != "none":
            try:
                self._server.offer(await trio.to_thread.run_sync(source.holdings))
            except (OSError, CheckpointError) as exc:
                logger.warning("no weights are given to peers: %s", exc)

    async def _bring(
        self, source: ModelSource, span: BlockSpan | None, *, embedding_and_head: bool, near_only: bool
    ) -> None:
        missing = source.missing(span, embedding_and_head=embedding_and_head)
        if not missing.files:
            return
        peers = self._of(source.spec.revision)
        label = f"fetching {source.spec.model} from peers"
        try:
            await peers.bring(missing.files, missing.folder, label=label, near_only=near_only)
        except ModelNotFound as exc:
            if not near_only:
                raise
            logger.debug("weights.nobody_near why=%s", exc)
        brought = peers.brought
        if brought.bytes:
            logger.info(
                "%.1f MB came from %d peers%s",
                sum(brought.bytes.values()) / 1e6,
                len(brought.bytes),
                "".join(f"; {peer_id} {why}" for peer_id, why in brought.liars.items()),
            )

    def _of(self, revision: str) -> PeerWeights:
        if self._peers is None:
            cache_dir, data_dir = self._folders
            self._peers = PeerWeights(
                self._member,
                revision,
                self._config,
                cache_dir,
                data_dir,
                weights_bytes=self._weights_bytes,
                is_private=self._is_private,
                progress=self._progress,
            )
        return self._peers


@contextmanager
def lend_weights(
    member: SwarmMember,
    config: WeightsConfig,
    node: NodeConfig,
    *,
    is_private: bool,
    progress: Progress | None = None,
) -> Generator[NodeWeights]:
    """Take and give weights until the block ends.

    Args:
        node: Says where weights and ledger are kept, and how much disk weights may take.
        is_private: This is a swarm with a key.
    """
    weights = NodeWeights(
        member,
        config,
        node.cache_dir,
        node.data_dir,
        weights_bytes=node.weights_bytes,
        is_private=is_private,
        progress=progress,
    )
    try:
        yield weights
    finally:
        weights.close()
