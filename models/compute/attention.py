"""Attention over a packed batch: products see all tokens at once, attention one sequence at a time.

The query heads that share a key head are laid out as rows of one query, as if they were tokens; so nothing
is repeated, and SDPA's fast kernel is reached. Measured on one core (torch 2.13, 16 query and 8 key heads
of 64), which decided the rest:

- One token, bfloat16, 512 cached: 862 us with SDPA's `enable_gqa`, 103 as rows. A model without groups
  doubles its only row there: that kernel is four times slower for a single one (370 us, 93).
- Matrix products of bfloat16 keys outside of SDPA are no alternative. oneDNN compiles a kernel for each
  number of cached tokens, hence for each step, and takes up to 5 ms for it.
- A prompt's first piece is `is_causal`, which skips half of the work (2047 tokens: 123 ms, masked 216).
  Later pieces need a mask: SDPA aligns the diagonal of a rectangle to its upper left corner.
- What SDPA does not compute (soft caps, ALiBi, sinks) goes by `scores.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .architecture import Architecture
from .cache import CacheLease
from .pool import PagePool
from .scores import attend_by_scores, extras_of


class Attention(Protocol):
    """The attention of one batch: which tokens there are, and what each of them sees."""

    positions: Tensor  # (tokens,) in their sequences, on the device

    def attend(self, block: int, queries: Tensor, keys_values: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Cache a block's keys and values and attend to what is cached.

        Args:
            block: Index within the span.
            queries: (tokens, heads, head_dim), rotated.
            keys_values: (tokens, 2 * kv_heads, head_dim), rotated keys, then values.
            sinks: (heads,) float32, scores that join each head's softmax and are dropped.

        Returns:
            (tokens, heads * head_dim).
        """
        ...


class Piece(NamedTuple):
    """Adjacent tokens of one sequence in a batch."""

    lease: CacheLease
    position: int  # of the first one, in its sequence
    tokens: int


class PackedAttention:
    """Attention of any mix of pieces, one after the other."""

    def __init__(
        self,
        architecture: Architecture,
        windows: Sequence[int | None],
        pool: PagePool,
        pieces: Sequence[Piece],
        stepwise: bool = False,
    ) -> None:
        """Attention of `pieces`; with `stepwise` in products that round one by one, see `Blocks.stepwise`."""
        slots: list[int] = []
        positions: list[int] = []
        self._counts: list[int] = []
        self._readers: list[_Reader] = []
        for piece in pieces:
            stop = piece.position + piece.tokens
            slots += piece.lease.slots(piece.position, stop)
            positions += range(piece.position, stop)
            self._counts.append(piece.tokens)
            self._readers.append(_Reader(architecture, windows, pool, piece, stepwise))
        self._pool = pool
        self._slots = torch.tensor(slots, device=pool.device)
        self.positions = torch.tensor(positions, device=pool.device)
        group = architecture.heads // architecture.kv_heads
        self._groups = (architecture.kv_heads, group, architecture.head_dim)

    def attend(self, block: int, queries: Tensor, keys_values: Tensor, sinks: Tensor | None = None) -> Tensor:
        """See `Attention`."""
        self._pool.write(block, self._slots, keys_values)
        grouped = queries.view(len(queries), *self._groups)
        if len(self._readers) == 1:
            return self._readers[0].read(block, grouped, sinks).reshape(len(queries), -1)
        parts = torch.split(grouped, self._counts)
        outputs = [reader.read(block, part, sinks) for reader, part in zip(self._readers, parts, strict=True)]
        return torch.cat(outputs).reshape(len(queries), -1)


class _Reader:
    """One piece's side of the attention, block after block."""

    def __init__(
        self,
        architecture: Architecture,
        windows: Sequence[int | None],
        pool: PagePool,
        piece: Piece,
        stepwise: bool,
    ) -> None:
        self._stepwise = stepwise
        self._architecture = architecture
        self._by_scores = stepwise or architecture.alibi or architecture.attention_softcap is not None
        self._scale = architecture.attention_scale
        self._tokens = piece.tokens
        length = piece.position + piece.tokens
        self._windows: list[int | None] = []
        self._visible: dict[int | None, _VisibleKeys] = {}
        for window in windows:
            # A window that holds the whole sequence is none.
            limit = None if window is None or window >= length else window
            self._windows.append(limit)
            if limit not in self._visible:
                self._visible[limit] = _VisibleKeys(architecture, pool, piece, limit)
        self._whole = piece.position == 0

    def read(self, block: int, queries: Tensor, sinks: Tensor | None) -> Tensor:
        """(tokens, kv_heads, group, head_dim) -> the same shape."""
        window = self._windows[block]
        visible = self._visible[window]
        if visible.in_place is None:
            keys, values = visible.gathered(block)
        else:
            keys, values = visible.in_place[0][block], visible.in_place[1][block]
        alone, by_scores = self._tokens == 1, self._by_scores or sinks is not None
        if not alone and self._whole and window is None and not by_scores:
            return _attend_causally(queries, keys, values, self._scale)
        rows = queries if alone else queries.transpose(0, 1).flatten(1, 2)[None]
        mask = None if alone else visible.mask
        if by_scores:
            extras = extras_of(self._architecture, sinks, visible.start, keys.shape[2], keys.device)
            output = attend_by_scores(rows, keys, values, mask, self._scale, extras, stepwise=self._stepwise)
        else:
            output = self._fused(rows, keys, values, mask)
        if alone:
            return output
        return output[0].view(len(rows[0]), len(queries), -1, rows.shape[-1]).transpose(0, 1)

    def _fused(self, rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(1, kv_heads, tokens * group, head_dim) -> the same shape."""
        if rows.shape[2] == 1 and rows.dtype != torch.float32:
            doubled = rows.expand(-1, -1, 2, -1)
            return functional.scaled_dot_product_attention(doubled, keys, values, scale=self._scale)[:, :, :1]
        return functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=self._scale)


class _VisibleKeys:
    """Keys that a piece's tokens see, through a window of so many tokens or without one.

    Attributes:
        start: Position of the first key.
        in_place: Keys and values by block, each (1, kv_heads, seen, head_dim), if they follow each other.
    """

    def __init__(self, architecture: Architecture, pool: PagePool, piece: Piece, window: int | None) -> None:
        self._pool = pool
        self._piece = piece
        self._window = window
        self._group = architecture.heads // architecture.kv_heads
        self._stop = piece.position + piece.tokens
        self.start = 0 if window is None else max(0, piece.position + 1 - window)
        first = piece.lease.start
        self.in_place: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
        if first is None:
            self._slots = torch.tensor(piece.lease.slots(self.start, self._stop), device=pool.device)
        else:
            self.in_place = pool.view(first + self.start, first + self._stop)

    def gathered(self, block: int) -> Tensor:
        """A copy of keys and values that do not lie `in_place`, (2, 1, kv_heads, seen, head_dim)."""
        return self._pool.gather(block, self._slots)

    @cached_property
    def mask(self) -> Tensor:
        """Mask to be added to the scores, (tokens * group, seen): 0 where a token sees a key, else -inf."""
        device = self._pool.device
        token = torch.arange(self._piece.position, self._stop, device=device)[:, None]
        key = torch.arange(self.start, self._stop, device=device)
        hidden = key > token
        if self._window is not None:
            hidden |= key <= token - self._window
        mask = torch.zeros(hidden.shape, dtype=self._pool.dtype, device=device)
        return mask.masked_fill_(hidden, -torch.inf).repeat_interleave(self._group, 0)


def _attend_causally(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    heads = queries.flatten(1, 2).transpose(0, 1)[None]
    output = functional.scaled_dot_product_attention(
        heads, keys, values, is_causal=True, scale=scale, enable_gqa=True
    )
    return output[0].transpose(0, 1).view(queries.shape)
