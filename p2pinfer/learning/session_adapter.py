"""Adapter that a client brings to the hops of its sessions, so that its texts are those of the tuned model.

It travels as for training, over `/p2pinfer/train/1.0.0`: digest, layout, values, within a limit.
A session is then opened under the revision of the model, a plus sign, and the adapter's name. So receipts
say by what the outputs were changed, and nobody takes them for those of the model alone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from p2pinfer.errors import PeerError
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.learning.adapter import Adapter, Factors
from p2pinfer.models.learning.brought import MARK, name_of
from p2pinfer.models.learning.peft_lora import Lora, read_lora
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.concurrency.nurseries import open_nursery
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.train_tensors import decode_vector, layout_of
from p2pinfer.routing.route import Hop

from .link_opening import open_link
from .train_link import TrainLink
from .trained_adapter import ModelAdapter


class SessionAdapter:
    """Adapter of a whole model for sessions. Made by `load_session_adapter`; many texts may use it."""

    def __init__(
        self,
        adapter: ModelAdapter,
        ends: EmbeddingAndHead,
        host: Network,
        turns: trio.CapacityLimiter,
        is_there: Callable[[Hop], bool] = lambda _: False,
    ) -> None:
        """An adapter.

        Args:
            turns: What all adapters of a client share, of `AT_ONCE` places.
            is_there: Says of a hop that it offers the adapter itself, for just these blocks.
        """
        self._adapter = adapter
        self._spec = ends.spec
        self._architecture = ends.architecture
        self._host = host
        self._turns = turns
        self._is_there = is_there

    def revision(self, revision: str, span: BlockSpan) -> str:
        """The model with this adapter, as sessions and receipts of these blocks name it."""
        part = self._adapter.part(span)
        return revision if part is None else revision + MARK + name_of(part.digest)

    def applied_to(self, span: BlockSpan) -> Adapter | None:
        """The adapter as a hop of these blocks computes with it; None if it changes none of them."""
        part = self._adapter.part(span)
        if part is None:
            return None
        layout = layout_of(part.updates, part.prompt_tokens)
        values = decode_vector(bytearray(part.payload), layout.size(self._architecture, span))
        return Adapter(layout, values, self._architecture, span)

    @asynccontextmanager
    async def brought(self, hops: Sequence[Hop], codec: Codec) -> AsyncGenerator[None]:
        """Have the adapter at each hop until the block ends. A session that was opened in it keeps it.

        Raises:
            PeerError: A hop cannot be reached, takes no adapters, or not this one.
        """
        hops = [hop for hop in hops if not self._is_there(hop)]
        if not hops:
            yield
            return
        async with self._turns, open_nursery() as nursery:
            links: list[TrainLink] = []
            failures: list[PeerError] = []

            async def bring(hop: Hop, scope: trio.CancelScope) -> None:
                try:
                    part = await trio.to_thread.run_sync(self._adapter.part, hop.span)
                    if part is not None:
                        link = await open_link(self._host, hop, self._spec, codec)
                        links.append(link)
                        nursery.start_soon(link.read)
                        await link.hold(part)
                except PeerError as exc:
                    failures.append(exc)
                    scope.cancel()

            async with trio.open_nursery() as bringing:
                for hop in hops:
                    bringing.start_soon(bring, hop, bringing.cancel_scope)
            try:
                if failures:
                    raise failures[0]
                yield
            finally:
                with trio.CancelScope(shield=True):
                    for link in links:
                        await link.close()


def load_session_adapter(
    folder: Path, ends: EmbeddingAndHead, host: Network, turns: trio.CapacityLimiter
) -> SessionAdapter:
    """LoRA from peft's files, for sessions of the model whose ends these are.

    Raises:
        ConfigError: It is for another model, or of a kind that does not run on the swarm.
    """
    lora = read_lora(folder, ends.spec, ends.architecture)
    return SessionAdapter(model_adapter(lora), ends, host, turns)


def model_adapter(lora: Lora) -> ModelAdapter:
    """Low-rank updates that were read or fetched, as sessions and trainers take them."""
    factors = [Factors(*lora.factors[at : at + 2]) for at in range(0, len(lora.factors), 2)]
    return ModelAdapter(lora.updates, factors)
