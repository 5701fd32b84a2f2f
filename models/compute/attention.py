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
- Soft caps (Gemma 2) are not to be had from SDPA. Those scores are computed in float32: accurate, and MKL
  compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .cache import CacheLease, PagedCache
from .families import Architecture

# Rows of scores held at once where they are not fused away.
_SCORE_ROWS = 256


class Attention(Protocol):
    """The attention of one batch: which tokens there are, and what each of them sees."""

    positions: Tensor  # (tokens,) in their sequences, on the device

    def attend(self, block: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Cache a block's keys and values and attend to what is cached.

        Args:
            block: Index within the span.
            queries: (tokens, heads, head_dim), rotated.
            keys_values: (tokens, 2 * kv_heads, head_dim), rotated keys, then values.

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
        cache: PagedCache,
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
            self._readers.append(_Reader(architecture, windows, cache, piece, stepwise))
        self._cache = cache
        self._slots = torch.tensor(slots, device=cache.device)
        self.positions = torch.tensor(positions, device=cache.device)
        group = architecture.heads // architecture.kv_heads
        self._groups = (architecture.kv_heads, group, architecture.head_dim)

    def attend(self, block: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        """See `Attention`."""
        self._cache.write(block, self._slots, keys_values)
        grouped = queries.view(len(queries), *self._groups)
        if len(self._readers) == 1:
            return self._readers[0].read(block, grouped).reshape(len(queries), -1)
        parts = torch.split(grouped, self._counts)
        outputs = [reader.read(block, part) for reader, part in zip(self._readers, parts, strict=True)]
        return torch.cat(outputs).reshape(len(queries), -1)


class _Reader:
    """One piece's side of the attention, block after block."""

    def __init__(
        self,
        architecture: Architecture,
        windows: Sequence[int | None],
        cache: PagedCache,
        piece: Piece,
        stepwise: bool,
    ) -> None:
        self._stepwise = stepwise
        self._scale = architecture.attention_scale
        self._softcap = architecture.attention_softcap
        self._tokens = piece.tokens
        length = piece.position + piece.tokens
        self._windows: list[int | None] = []
        self._visible: dict[int | None, _VisibleKeys] = {}
        for window in windows:
            # A window that holds the whole sequence is none.
            limit = None if window is None or window >= length else window
            self._windows.append(limit)
            if limit not in self._visible:
                self._visible[limit] = _VisibleKeys(architecture, cache, piece, limit)
        self._whole = piece.position == 0

    def read(self, block: int, queries: Tensor) -> Tensor:
        """(tokens, kv_heads, group, head_dim) -> the same shape."""
        window = self._windows[block]
        visible = self._visible[window]
        if visible.in_place is None:
            keys, values = visible.gathered(block)
        else:
            keys, values = visible.in_place[0][block], visible.in_place[1][block]
        if self._tokens == 1:
            return self._read_rows(queries, keys, values, None)
        if self._whole and window is None and self._softcap is None and not self._stepwise:
            return _attend_causally(queries, keys, values, self._scale)
        rows = queries.transpose(0, 1).flatten(1, 2)[None]
        output = self._read_rows(rows, keys, values, visible.mask)
        return output[0].view(len(rows[0]), len(queries), -1, rows.shape[-1]).transpose(0, 1)

    def _read_rows(self, rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(1, kv_heads, tokens * group, head_dim) -> the same shape."""
        if self._stepwise:
            return attend_stepwise(rows, keys, values, mask, self._scale, self._softcap)
        if self._softcap is not None:
            return attend_capped(rows, keys, values, mask, self._scale, self._softcap)
        if rows.shape[2] == 1 and rows.dtype != torch.float32:
            doubled = rows.expand(-1, -1, 2, -1)
            return functional.scaled_dot_product_attention(doubled, keys, values, scale=self._scale)[:, :, :1]
        return functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=self._scale)


class _VisibleKeys:
    """Keys that a piece's tokens see, through a window of so many tokens or without one.

    Attributes:
        in_place: Keys and values by block, each (1, kv_heads, seen, head_dim), if they follow each other.
    """

    def __init__(
        self, architecture: Architecture, cache: PagedCache, piece: Piece, window: int | None
    ) -> None:
        self._cache = cache
        self._piece = piece
        self._window = window
        self._group = architecture.heads // architecture.kv_heads
        self._stop = piece.position + piece.tokens
        self._start = 0 if window is None else max(0, piece.position + 1 - window)
        first = piece.lease.start
        self.in_place: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
        if first is None:
            self._slots = torch.tensor(piece.lease.slots(self._start, self._stop), device=cache.device)
        else:
            self.in_place = cache.view(first + self._start, first + self._stop)

    def gathered(self, block: int) -> Tensor:
        """A copy of keys and values that do not lie `in_place`, (2, 1, kv_heads, seen, head_dim)."""
        return self._cache.gather(block, self._slots)

    @cached_property
    def mask(self) -> Tensor:
        """Mask to be added to the scores, (tokens * group, seen): 0 where a token sees a key, else -inf."""
        device = self._cache.device
        token = torch.arange(self._piece.position, self._stop, device=device)[:, None]
        key = torch.arange(self._start, self._stop, device=device)
        hidden = key > token
        if self._window is not None:
            hidden |= key <= token - self._window
        mask = torch.zeros(hidden.shape, dtype=self._cache.dtype, device=device)
        return mask.masked_fill_(hidden, -torch.inf).repeat_interleave(self._group, 0)


def _attend_causally(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    heads = queries.flatten(1, 2).transpose(0, 1)[None]
    output = functional.scaled_dot_product_attention(
        heads, keys, values, is_causal=True, scale=scale, enable_gqa=True
    )
    return output[0].transpose(0, 1).view(queries.shape)


def attend_capped(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention under a soft cap: (any, kv_heads, rows, head_dim) -> the same, `mask` added to the scores."""
    keys, values = keys.float().transpose(2, 3) * (scale / softcap), values.float()
    outputs: list[Tensor] = []
    for start in range(0, rows.shape[2], _SCORE_ROWS):
        part = slice(start, start + _SCORE_ROWS)
        scores = (rows[:, :, part].float() @ keys).tanh_().mul_(softcap)
        if mask is not None:
            scores.add_(mask[..., part, :])
        outputs.append(scores.softmax(-1) @ values)
    return torch.cat(outputs, 2).to(rows.dtype)


def attend_stepwise(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention as transformers' eager one has it, scores and weights rounded to the rows' dtype.

    (any, kv_heads, rows, head_dim) -> the same, `mask` added to the scores.
    """
    keys = keys.transpose(2, 3)
    outputs: list[Tensor] = []
    for start in range(0, rows.shape[2], _SCORE_ROWS):
        part = slice(start, start + _SCORE_ROWS)
        scores = (rows[:, :, part] @ keys) * scale
        if softcap is not None:
            scores = (scores / softcap).tanh_() * softcap
        if mask is not None:
            scores += mask[..., part, :]
        outputs.append(scores.softmax(-1, dtype=torch.float32).to(rows.dtype) @ values)
    return torch.cat(outputs, 2)
