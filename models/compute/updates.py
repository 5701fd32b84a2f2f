"""Low-rank updates on the rows of a batch: those of one session are changed by its adapter, others by none.

    output[rows] += up (down rows)

What one adapter changes is gathered over the batch, so that it costs two products for each product of the
block, however many sessions have it (after Punica, L. Chen et al., arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class SpanUpdates(Protocol):
    """Updates of one adapter, by block and product: `qkv`, `output`, `gate_up` and `down`."""

    def pair(self, block: int, product: str) -> tuple[Tensor, Tensor] | None:
        """(rank, in_features) and (out_features, rank), float32, scaled; None where it changes nothing."""
        ...


class RowUpdates:
    """Updates of a batch."""

    def __init__(self, pieces: Sequence[tuple[int, SpanUpdates | None]], device: torch.device) -> None:
        """Updates of a batch whose pieces have so many tokens each, one after the other."""
        rows: dict[int, list[int]] = {}
        updates: dict[int, SpanUpdates] = {}
        start = 0
        for tokens, each in pieces:
            if each is not None:
                updates[id(each)] = each
                rows.setdefault(id(each), []).extend(range(start, start + tokens))
            start += tokens
        self._parts = [(_where(found, device), updates[key]) for key, found in rows.items()]

    def add(self, block: int, product: str, rows: Tensor, output: Tensor) -> None:
        """Change what a product gave, in place.

        Args:
            block: Index of the block within the model.
            rows: (tokens, in_features), what went into the product.
            output: (tokens, out_features); rounded once, as in training.
        """
        for where, updates in self._parts:
            pair = updates.pair(block, product)
            if pair is None:
                continue
            down, up = pair
            change = functional.linear(functional.linear(rows[where].float(), down), up)
            output[where] = (output[where].float() + change).to(output.dtype)


def _where(rows: list[int], device: torch.device) -> slice | Tensor:
    """Rows as an index: a slice, which copies nothing, where they are adjacent."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
