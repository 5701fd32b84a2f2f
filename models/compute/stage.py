"""Stage of a span: adjacent blocks on one device, with the pool and the recorded steps that lie there.

A span on several devices is a row of stages, as in pipeline parallelism (GPipe, arXiv 1811.06965). What a
batch needs from the host is copied to every device first (`prepare`). Then hidden states go from stage to
stage, and the host only launches: between cards torch copies peer to peer, on the streams of both, each of
which waits for the other by an event. Only the reader of the last stage's output waits for the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from p2pinfer.models.span import BlockSpan

from .attention import PackedAttention, Piece
from .blocks import Blocks
from .paged_decode import PagedDecoder
from .pool import PagePool
from .updates import RowUpdates, SpanUpdates

# (tokens, hidden_size) on any device -> the same on the stage's; it does not wait for the device.
Pass: TypeAlias = Callable[[Tensor], Tensor]

PART_TOKENS: Final = 256  # of a batch that passes several stages; fewer would leave a card's products small


class Row(NamedTuple):
    """A piece of a batch, and the low-rank updates of its session."""

    piece: Piece
    updates: SpanUpdates | None = None


class Stage:
    """Blocks of a span that lie on one device.

    Attributes:
        blocks: Those.
        span: Which of the model's blocks they are.
        device: Where.
    """

    def __init__(self, blocks: Blocks, pool: PagePool, decoder: PagedDecoder | None = None) -> None:
        """A stage; steps of one token a session through all of it go to `decoder` where it accepts them."""
        self.blocks = blocks
        self.span = blocks.span
        self.device = blocks.device
        self._pool = pool
        self._decoder = decoder

    def recorded(self) -> Stage:
        """The stage with steps of one token a session as a GPU records them."""
        return Stage(self.blocks, self._pool, PagedDecoder(self.blocks, self._pool))

    def with_blocks(self, blocks: Blocks) -> Stage:
        """The stage with other blocks on the same weights, unrecorded."""
        return Stage(blocks, self._pool)

    def prepare(self, rows: Sequence[Row], span: BlockSpan) -> Pass:
        """A pass of a batch through the part of `span` that is here, with all that the host knows of it."""
        part = self.span
        if span is not part:
            part = BlockSpan(max(span.start, part.start), min(span.stop, part.stop))
        pieces = [row.piece for row in rows]
        updated = any(row.updates is not None for row in rows)
        # Only the whole stage is recorded: a client chooses the part, and each recording holds memory.
        is_whole = part is self.span or part == self.span
        decoder = self._decoder if is_whole and not updated else None
        if decoder is not None and decoder.accepts(pieces):
            return decoder.prepare(pieces, part)
        blocks = self.blocks
        attention = PackedAttention(
            blocks.architecture, blocks.windows, self._pool, pieces, blocks.rounds_stepwise
        )
        updates: RowUpdates | None = None
        if updated:
            updates = RowUpdates([(row.piece.tokens, row.updates) for row in rows], self.device)

        def run(hidden: Tensor) -> Tensor:
            return blocks.forward(hidden.to(self.device), attention, part, updates)

        return run


def run_stages(
    stages: Sequence[Stage],
    rows: Sequence[Row],
    hidden: Tensor,
    span: BlockSpan,
) -> Tensor:
    """Hidden states after `span`, on the last device; nothing is waited for.

    A long batch is cut, and its parts follow each other: while one device computes a part, the device before
    it computes the next one.

    Args:
        rows: The batch; of one session only pieces that follow each other.
        hidden: (tokens, hidden_size) of all pieces, any device.
    """
    used = [stage for stage in stages if stage.span.start < span.stop and span.start < stage.span.stop]
    parts = [rows] if len(used) == 1 else cut(rows, PART_TOKENS)
    # All that comes from the host before the first launch: such a copy waits for what its device has to do.
    passes = [[stage.prepare(part, span) for stage in used] for part in parts]
    hidden = hidden.to(used[0].device)
    outputs: list[Tensor] = []
    for part, row in zip(torch.split(hidden, [_tokens(part) for part in parts]), passes, strict=True):
        for each in row:
            part = each(part)
        outputs.append(part)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def cut(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """A batch in parts of at most `most` tokens, in order; a piece may be cut."""
    parts: list[list[Row]] = [[]]
    room = most
    for piece, updates in rows:
        position, left = piece.position, piece.tokens
        while left:
            if not room:
                parts.append([])
                room = most
            taken = min(left, room)
            parts[-1].append(Row(Piece(piece.lease, position, taken), updates))
            position, left, room = position + taken, left - taken, room - taken
    return parts


def _tokens(rows: Sequence[Row]) -> int:
    return sum(row.piece.tokens for row in rows)
