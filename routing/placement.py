"""Placement of a node: the span that makes the swarm's slowest block as fast as possible.

A block is as fast as all peers that hold it together, in tokens per second. Of two placements the better
one has the faster slowest block; if these are equally fast, the next slowest decide, and so on. So blocks
that nobody holds come first by themselves. Petals places its servers by a kindred rule
(server/block_selection.py).

To move costs a download, a reload and every open session, so a node stays where it is unless the gain is
large. Moves one after another come to an end, because each makes the swarm strictly better. Two nodes that
look at the same moment could make the same move; callers look at times of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from p2pinfer.models.span import BlockSpan

from .announcement import Announcement
from .config import PlacementConfig

_NEARLY: Final = 0.75  # a span remembered is not given up for a third more blocks


def choose_span(
    announcements: Iterable[Announcement],
    num_blocks: int,
    capacity_blocks: int,
    tokens_per_s_per_block: float,
    last: BlockSpan | None = None,
    config: PlacementConfig | None = None,
) -> BlockSpan:
    """The span with which a newcomer serves the swarm best; the first one, if several do.

    Args:
        announcements: What everybody else serves, all of one model revision.
        capacity_blocks: Blocks the newcomer has room for; it takes as many, or all there are.
        tokens_per_s_per_block: Its speed if it held a single block.
        last: What it served before it was restarted. It keeps that, unless it would pay to move away or
            there is room for a good deal more.
    """
    if capacity_blocks < 1:
        raise ValueError(f"a node cannot hold {capacity_blocks} blocks")
    rates = _rates(announcements, num_blocks)
    width = min(capacity_blocks, num_blocks)
    spans = [BlockSpan(start, start + width) for start in range(num_blocks - width + 1)]
    best = max(spans, key=lambda span: sorted(_with(rates, span, tokens_per_s_per_block / width)))
    # How much memory is free differs a little with every start; that alone is no reason to move.
    if last is None or last.stop > num_blocks or not _NEARLY * width <= len(last) <= width:
        return best
    before = _with(rates, last, tokens_per_s_per_block / len(last))
    after = _with(rates, best, tokens_per_s_per_block / width)
    return best if _pays(before, after, config or PlacementConfig()) else last


def should_move(
    own: Announcement,
    others: Iterable[Announcement],
    num_blocks: int,
    dwelt_s: float,
    config: PlacementConfig | None = None,
) -> BlockSpan | None:
    """Span that a node should move to; None if it should stay.

    A move pays if it leaves fewer blocks unserved, or as many and the slowest block faster by `min_gain`.

    Args:
        own: What the node serves.
        others: What everybody else serves, of the same model revision.
        dwelt_s: For how long the node has served these blocks.
    """
    config = config or PlacementConfig()
    if dwelt_s < config.min_dwell_s:
        return None
    others = list(others)
    width = len(own.span)
    target = choose_span(others, num_blocks, width, own.tokens_per_s * width)
    rates = _rates(others, num_blocks)
    before = _with(rates, own.span, own.tokens_per_s)
    after = _with(rates, target, own.tokens_per_s)
    return target if _pays(before, after, config) else None


def _pays(before: Sequence[float], after: Sequence[float], config: PlacementConfig) -> bool:
    """True if these rates of all blocks are worth giving up those."""
    if after.count(0.0) != before.count(0.0):
        return after.count(0.0) < before.count(0.0)
    return min(after) > min(before) * (1 + config.min_gain)


def _rates(announcements: Iterable[Announcement], num_blocks: int) -> list[float]:
    """Tokens per second of every block."""
    rates = [0.0] * num_blocks
    for announcement in announcements:
        if not announcement.leaving and announcement.span.stop <= num_blocks:
            rates = _with(rates, announcement.span, announcement.tokens_per_s)
    return rates


def _with(rates: Sequence[float], span: BlockSpan, tokens_per_s: float) -> list[float]:
    """The rates once a peer adds its own to the blocks of `span`."""
    return [
        rate + tokens_per_s if span.start <= block < span.stop else rate for block, rate in enumerate(rates)
    ]
