"""Sessions through a span from beginning to end, as prompts go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from p2pinfer.models.compute.layers import padded_rows
from p2pinfer.models.compute.runner import Chunk, SpanRunner
from p2pinfer.models.span import BlockSpan

from .experts import RoutingLog, SharedChoice
from .noise_floor import carried_square

PIECE_TOKENS: Final = 512  # run at once


def run_session(
    runner: SpanRunner, hidden: Tensor, span: BlockSpan | None = None, carried: Tensor | None = None
) -> Tensor:
    """(tokens, hidden_size) in, the same out in float32, in a session of its own.

    The end is filled up as products fill up theirs, which changes nothing before it: oneDNN makes kernels
    for every number of rows that it has not seen, those of stepwise attention too, and 40 tokens through 3
    blocks took 25 ms with that, 15 without.

    Args:
        carried: (tokens, hidden_size) float32, to which `carried_square` of what each block gives is added.
    """
    tokens = len(hidden)
    whole = runner.span if span is None else span
    parts = (
        [whole] if carried is None else [BlockSpan(each, each + 1) for each in range(whole.start, whole.stop)]
    )
    hidden = torch.cat([hidden, hidden[-1:].expand(padded_rows(tokens) - tokens, -1)])
    lease = runner.cache.reserve(len(hidden))
    try:
        outputs: list[Tensor] = []
        for piece in torch.split(hidden, PIECE_TOKENS):
            position = lease.length
            for part in parts:
                (piece,) = runner.run([Chunk(lease, position, piece)], part)
                if carried is not None:
                    room = carried[position : position + len(piece)]
                    room += carried_square(piece[: len(room)])
            outputs.append(piece.float())
        return torch.cat(outputs)[:tokens]
    finally:
        lease.release()


def run_sessions(
    runner: SpanRunner, sessions: Sequence[Tensor], span: BlockSpan | None = None
) -> list[Tensor]:
    """`run_session` of several of one length; as one batch, which is quicker, where the cache has room.

    Where there are experts, all sessions go to those that the first one chooses.
    """
    tokens, count, page = len(sessions[0]), len(sessions), runner.cache.page_tokens
    if tokens * count > PIECE_TOKENS or -(-tokens // page) * page * count > runner.cache.free_tokens:
        if not runner.has_experts:
            return [run_session(runner, each, span) for each in sessions]
        log = RoutingLog()
        first = run_session(runner.choosing(log), sessions[0], span)
        others = (run_session(runner.choosing(RoutingLog(follow=log)), each, span) for each in sessions[1:])
        return [first, *others]
    if runner.has_experts:
        runner = runner.choosing(SharedChoice(tokens))
    leases = [runner.cache.reserve(tokens) for _ in sessions]
    try:
        chunks = [Chunk(lease, 0, each) for lease, each in zip(leases, sessions, strict=True)]
        return [each.float() for each in runner.run(chunks, span)]
    finally:
        for lease in leases:
            lease.release()
