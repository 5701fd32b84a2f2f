"""Sequences of a microbatch, side by side without padding, and the attention among their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.compute.scores import Extras, attend_by_scores, extras_of


class Rows:
    """Layout of a microbatch: the tokens of its sequences, one sequence after the other.

    Attributes:
        lengths: Tokens of each sequence.
        positions: (tokens,) int64: the position that each token is rotated to.
        indices: (tokens,) int64: where each token stands in its sequence, rising; windows are measured by it.
            The tokens of a prefix stand at 0, 1, 2, ..., so with one these begin behind it.
    """

    def __init__(self, lengths: Sequence[int], positions: Tensor, indices: Tensor) -> None:
        """A layout; positions and indices are checked by whoever got them from a peer."""
        assert sum(lengths) == len(positions) == len(indices)
        self.lengths = tuple(lengths)
        self.positions = positions
        self.indices = indices
        self._groups = [(length, len(list(alike))) for length, alike in groupby(self.lengths)]
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._elsewhere: dict[torch.device, Rows] = {}

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return len(self.positions)

    def to(self, device: torch.device) -> Rows:
        """The same layout on a device; the same object each time, since its masks are kept."""
        if device == self.positions.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Rows(self.lengths, self.positions.to(device), self.indices.to(device))
        return self._elsewhere[device]

    def first_tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` tokens of every sequence: where they are, and which of the `count` each is."""
        rows: list[int] = []
        which: list[int] = []
        start = 0
        for length in self.lengths:
            rows += range(start, start + min(length, count))
            which += range(min(length, count))
            start += length
        device = self.positions.device
        return torch.tensor(rows, device=device), torch.tensor(which, device=device)

    def attend(
        self,
        architecture: Architecture,
        window: int | None,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor | None = None,
        *,
        prefix: tuple[Tensor, Tensor] | None = None,
        stepwise: bool = False,
    ) -> Tensor:
        """Causal attention within each sequence; differentiable.

        Args:
            window: How many tokens back a token sees, itself included; None: all.
            queries: (tokens, heads, head_dim).
            keys: (tokens, kv_heads, head_dim), as are the values.
            sinks: (heads,) float32, scores that join each head's softmax and are dropped.
            prefix: Keys and values before those of every sequence, (prefix tokens, kv_heads * head_dim) each.
            stepwise: Round after every operation, as `Blocks.stepwise` does.

        Returns:
            (tokens, heads * head_dim).
        """
        outputs: list[Tensor] = []
        start = 0
        for length, count in self._groups:
            part = slice(start, start + length * count)
            shape = (count, length)
            heads = [
                each[part].view(*shape, *each.shape[1:]).transpose(1, 2) for each in (queries, keys, values)
            ]
            before = 0 if prefix is None else len(prefix[0])
            if prefix is not None:
                heads[1:] = [_behind(*pair) for pair in zip(prefix, heads[1:], strict=True)]
            limit = None if window is None or window >= self._reach(part, length, before) else window
            extras = extras_of(architecture, sinks, 0, before + length, queries.device)
            at = (part, length, before)
            output = self._attend(architecture, at, limit, extras, *heads, stepwise=stepwise)
            outputs.append(output.transpose(1, 2).reshape(length * count, -1))
            start = part.stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _reach(self, part: slice, length: int, before: int) -> int:
        """Distance from a group's first tokens, or those of a prefix, to the last ones, both included."""
        ends = self.indices[part].view(-1, length)
        return int((ends[:, -1] - (0 if before else ends[:, 0])).max()) + 1

    def _attend(
        self,
        architecture: Architecture,
        at: tuple[slice, int, int],
        window: int | None,
        extras: Extras,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        stepwise: bool,
    ) -> Tensor:
        scale, (_, length, before) = architecture.attention_scale, at
        is_fused = extras.are_none and not stepwise
        if is_fused and window is None and not before:
            return functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
            )
        mask = self._mask(*at, window, queries.dtype)
        if is_fused:
            return functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            )
        # Rows of one key head: its queries of one token after those of the other.
        shape = (len(queries), architecture.kv_heads, -1, length, architecture.head_dim)
        rows = queries.reshape(shape).transpose(2, 3).flatten(2, 3)
        group = architecture.heads // architecture.kv_heads
        mask = mask.repeat_interleave(group, 2)
        output = attend_by_scores(rows, keys, values, mask, scale, extras, stepwise=stepwise)
        apart = output.view(*output.shape[:2], length, group, -1)
        return apart.transpose(2, 3).reshape(queries.shape)

    def _mask(self, part: slice, length: int, before: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(sequences, 1, length, before + length): 0 where a token sees a key, else -inf."""
        key = (part.start, before, window)
        if key not in self._masks:
            at = self.indices[part].view(-1, 1, length)
            first = torch.arange(before, device=at.device).expand(len(at), 1, before)
            distance = at[..., None] - torch.cat((first, at), -1)[:, :, None]
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._masks[key] = zeros.masked_fill_(hidden, -torch.inf)
        return self._masks[key]


def _behind(prefix: Tensor, heads: Tensor) -> Tensor:
    """`heads`, (sequences, kv_heads, length, head_dim), each behind (prefix tokens, kv_heads * head_dim)."""
    sequences, kv_heads, _, size = heads.shape
    first = prefix.to(heads.dtype).view(-1, kv_heads, size).transpose(0, 1).expand(sequences, -1, -1, -1)
    return torch.cat((first, heads), 2)
