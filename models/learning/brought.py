"""Adapters that clients have brought to a node for their sessions, by client and name.

They are held by whoever uses them: the training session that brought one, and the sessions that were opened
with it. So an adapter is gone with the last of these, and nothing of a client's stays. Those that the node
itself offers stay, and are for everybody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from p2pinfer.models.checkpoint.spec import MARK as MARK
from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.span import BlockSpan

from .adapter import Adapter, projection_shape

NAME_CHARS: Final = 31  # of hex digits: 124 bits of a digest, what a revision's field has room for
_PRODUCTS: Final = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def name_of(digest: bytes) -> str:
    """Name of an adapter's part, as sessions and their receipts have it behind the revision."""
    return digest.hex()[:NAME_CHARS]


class BroughtAdapter:
    """An adapter of a span as `compute.updates.SpanUpdates`.

    Updates that share a product are laid out as one pair when a block is first run, in the thread that does.
    """

    def __init__(
        self,
        adapter: Adapter,
        architecture: Architecture,
        span: BlockSpan,
        device_of: Callable[[int], torch.device] | None = None,
    ) -> None:
        """An adapter of a span; `device_of` says where a block is computed if not where the adapter is."""
        self.span = span
        self.size = 2 * adapter.values.nbytes  # as it came, and as it is laid out
        self._adapter = adapter
        self._architecture = architecture
        self._device_of = device_of
        self._pairs: dict[tuple[int, str], tuple[Tensor, Tensor] | None] = {}

    def pair(self, block: int, product: str) -> tuple[Tensor, Tensor] | None:
        """See `SpanUpdates`."""
        key = (block, product)
        if key not in self._pairs:
            self._pairs[key] = self._laid_out(block, _PRODUCTS[product])
        return self._pairs[key]

    def _laid_out(self, block: int, projections: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
        part = self._adapter.of_block(block)
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        rank = sum(update.rank for name in projections for update, _ in part.on(name))
        if not rank:
            return None
        at = 0
        for name in (each for each in projections if each in self._architecture.projections):
            outputs = projection_shape(self._architecture, name)[1]
            up = torch.zeros(outputs, rank, device=self._adapter.values.device)
            for update, factors in part.on(name):
                downs.append(factors.down)
                up[:, at : at + update.rank] = factors.up * update.scale
                at += update.rank
            ups.append(up)
        device = self._adapter.values.device if self._device_of is None else self._device_of(block)
        return torch.cat(downs).to(device), torch.cat(ups).to(device)


class AdapterShelf:
    """Adapters that are at hand. For the event loop."""

    def __init__(self) -> None:
        self._adapters: WeakValueDictionary[tuple[str, str], BroughtAdapter] = WeakValueDictionary()
        self._offered: dict[str, BroughtAdapter] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of all that clients have brought and that are in use."""
        return sum(each.size for each in self._adapters.values())

    def put(self, client: str, digest: bytes, adapter: BroughtAdapter) -> BroughtAdapter:
        """Offer an adapter to its client's sessions; returns the one to hold, which may be there already."""
        return self._adapters.setdefault((client, name_of(digest)), adapter)

    def offer(self, digest: bytes, adapter: BroughtAdapter) -> None:
        """Have an adapter at hand for every client's sessions."""
        self._offered[name_of(digest)] = adapter

    def is_offered(self, revision: str) -> bool:
        """True if a session asks, by its revision, for an adapter that is at hand for everybody."""
        return revision.partition(MARK)[2] in self._offered

    def find(self, client: str, revision: str, span: BlockSpan) -> BroughtAdapter | None:
        """The adapter that a session asks for by its revision.

        Raises:
            KeyError: It asks for one that is not here, or not for these blocks.
        """
        _, mark, name = revision.partition(MARK)
        if not mark:
            return None
        found = self._offered.get(name) or self._adapters[client, name]
        if not found.span.covers(span):
            raise KeyError(name)
        return found
