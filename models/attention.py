"""Attention over a packed batch: the linear layers see all tokens at once, attention one sequence at a time.

The query heads that share a key head are laid out as rows of one query, as if they were tokens; so nothing
is repeated, and SDPA's fast kernel is reached. Measured on one core (torch 2.13, 16 query and 8 key heads
of 64), which decided the rest:

- One token, bfloat16, 512 cached: 862 us with SDPA's `enable_gqa`, 103 as rows. A model without groups
  doubles its only row: that kernel is four times slower for a single one.
- Matrix products of bfloat16 keys outside of SDPA are no alternative. oneDNN compiles a kernel for each
  number of cached tokens, hence for each step, and takes up to 5 ms for it.
- A prompt's first piece is `is_causal`, which skips half of the work (2047 tokens: 123 ms, masked 216).
  Later pieces need a mask: SDPA aligns the diagonal of a rectangle to its upper left corner.
- Soft caps (Gemma 2) are not to be had from SDPA. Those scores are computed in float32: accurate, and MKL
  compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .cache import CacheLease, PagedCache
from .families import Architecture

# Rows of scores held at once under a soft cap, where they are not fused away.
_SOFTCAP_ROWS = 256


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


@dataclass(frozen=True, slots=True)
class Piece:
    """Adjacent tokens of one sequence in a batch."""

    lease: CacheLease
    position: int  # of the first one, in its sequence
    tokens: int


class PackedAttention:
    """Attention of any mix of pieces, one sequence after the other."""

    def __init__(
        self,
        architecture: Architecture,
        windows: Sequence[int | None],
        cache: PagedCache,
        pieces: Sequence[Piece],
    ) -> None:
        device = cache.device
        self._cache = cache
        self._windows = windows
        slots = [piece.lease.slots(piece.position, piece.position + piece.tokens) for piece in pieces]
        positions = [torch.arange(piece.position, piece.position + piece.tokens) for piece in pieces]
        self._slots = torch.cat(slots).to(device)
        self.positions = torch.cat(positions).to(device)
        self._readers = [_Reader(architecture, cache, piece) for piece in pieces]
        self._counts = [piece.tokens for piece in pieces]

    def attend(self, block: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        """See `Attention`."""
        self._cache.write(block, self._slots, keys_values)
        window = self._windows[block]
        parts = torch.split(queries, self._counts)
        outputs = [
            reader.read(block, part, window) for reader, part in zip(self._readers, parts, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Reader:
    """One piece's side of the attention, and what all blocks share of it."""

    def __init__(self, architecture: Architecture, cache: PagedCache, piece: Piece) -> None:
        self._architecture = architecture
        self._cache = cache
        self._piece = piece
        self._length = piece.position + piece.tokens
        self._masks: dict[int | None, Tensor] = {}
        start = piece.lease.start
        self._in_place = None if start is None else cache.view(start, start + self._length)
        self._slots = piece.lease.slots(0, self._length).to(cache.device) if start is None else None

    def read(self, block: int, queries: Tensor, window: int | None) -> Tensor:
        """(tokens, heads, head_dim) -> (tokens, heads * head_dim)."""
        keys, values = self._cached(block)
        tokens = self._piece.tokens
        if window is not None and window < self._length:
            seen = min(self._length, tokens + window - 1)  # by any of the tokens
            keys, values = keys[:, :, -seen:], values[:, :, -seen:]
        else:
            window = None
        architecture = self._architecture
        if (
            architecture.attention_softcap is None
            and window is None
            and self._piece.position == 0
            and tokens > 1
        ):
            return _attend_causally(queries, keys, values, architecture.attention_scale)
        mask = None if tokens == 1 else self._mask(window, keys.shape[2], queries.dtype)
        rows = _heads_as_rows(queries, architecture.kv_heads)
        if architecture.attention_softcap is not None:
            output = _attend_capped(
                rows, keys, values, mask, architecture.attention_scale, architecture.attention_softcap
            )
        else:
            output = _attend(rows, keys, values, mask, architecture.attention_scale)
        return _rows_as_heads(output, tokens)

    def _cached(self, block: int) -> tuple[Tensor, Tensor]:
        if self._in_place is not None:
            keys, values = self._in_place
            return keys[block], values[block]
        assert self._slots is not None
        keys, values = self._cache.gather(block, self._slots)
        return keys, values

    def _mask(self, window: int | None, seen: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, (rows, seen): 0 where a token sees a key, else -inf."""
        if window not in self._masks:
            device = self._cache.device
            token = torch.arange(self._piece.position, self._length, device=device)[:, None]
            key = torch.arange(self._length - seen, self._length, device=device)
            hidden = key > token
            if window is not None:
                hidden |= key <= token - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            group = self._architecture.heads // self._architecture.kv_heads
            self._masks[window] = mask.repeat_interleave(group, 0)
        return self._masks[window]


def _heads_as_rows(queries: Tensor, kv_heads: int) -> Tensor:
    """(tokens, heads, head_dim) -> (1, kv_heads, tokens * group, head_dim)."""
    tokens, heads, size = queries.shape
    grouped = queries.view(tokens, kv_heads, heads // kv_heads, size).transpose(0, 1)
    return grouped.reshape(1, kv_heads, -1, size)


def _rows_as_heads(rows: Tensor, tokens: int) -> Tensor:
    """(1, kv_heads, tokens * group, head_dim) -> (tokens, heads * head_dim)."""
    _, kv_heads, _, size = rows.shape
    return rows.reshape(kv_heads, tokens, -1, size).transpose(0, 1).reshape(tokens, -1)


def _attend(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if rows.shape[2] > 1:
        return functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    doubled = rows.expand(-1, -1, 2, -1)
    return functional.scaled_dot_product_attention(doubled, keys, values, scale=scale)[:, :, :1]


def _attend_causally(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    output = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys, values, is_causal=True, scale=scale, enable_gqa=True
    )
    return output[0].transpose(0, 1).flatten(1)


def _attend_capped(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    keys, values = keys.float().transpose(2, 3) * (scale / softcap), values.float()
    outputs: list[Tensor] = []
    for start in range(0, rows.shape[2], _SOFTCAP_ROWS):
        part = slice(start, start + _SOFTCAP_ROWS)
        scores = (rows[:, :, part].float() @ keys).tanh_().mul_(softcap)
        if mask is not None:
            scores.add_(mask[part])
        outputs.append(scores.softmax(-1) @ values)
    return torch.cat(outputs, 2).to(rows.dtype)
