"""Split of a span over the devices that a node was given: how many blocks each of them holds.

Cards share the blocks in proportion to their free memory. A processor named beside cards holds what they have
no room for, and nothing else, since it is slower by far.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from p2pinfer.models.span import BlockSpan

from .memory import WEIGHTS_SHARE, FreeMemory, free_on

logger = logging.getLogger(__name__)


def rooms_of(devices: Sequence[torch.device]) -> list[FreeMemory]:
    """Free memory of each device; one that is named several times is shared evenly."""
    found = {device: free_on(device) for device in devices}
    return [_shared(found[device], devices.count(device)) for device in devices]


def blocks_that_fit(room: FreeMemory, block_bytes: int) -> int:
    """Number of blocks that a device holds beside its part of the cache."""
    return int(room.bytes * WEIGHTS_SHARE / block_bytes)


def split_span(span: BlockSpan, devices: Sequence[torch.device], block_bytes: int) -> list[BlockSpan | None]:
    """Blocks of `span` that each device holds, in order; None for those left out, which are logged."""
    if len(devices) == 1:
        return [span]
    rooms = rooms_of(devices)
    of_cards = [
        0 if device.type == "cpu" else room.bytes for device, room in zip(devices, rooms, strict=True)
    ]
    of_others = [room.bytes - card for room, card in zip(rooms, of_cards, strict=True)]
    on_cards = len(span)
    if any(of_others):
        fit = sum(blocks_that_fit(FreeMemory(card), block_bytes) for card in of_cards)
        on_cards = min(fit, len(span))
    counts = [
        card + other
        for card, other in zip(
            apportion(on_cards, of_cards, block_bytes),
            apportion(len(span) - on_cards, of_others, block_bytes),
            strict=True,
        )
    ]
    found: list[BlockSpan | None] = []
    start = span.start
    for device, room, count in zip(devices, rooms, counts, strict=True):
        found.append(BlockSpan(start, start + count) if count else None)
        start += count
        if not count:
            logger.warning(
                "%s holds none of blocks %s: a block takes %.1f GiB, and %s; the other devices hold them",
                device,
                span,
                block_bytes / 2**30,
                room,
            )
    return found


def apportion(blocks: int, rooms: Sequence[int], block_bytes: int) -> list[int]:
    """Number of blocks for each device, in proportion to its free bytes (largest remainders, as of Hamilton).

    A device without room for a block gets none, unless all are like that: then loading says what is missing.
    """
    weights = [room if room >= block_bytes else 0 for room in rooms]
    if not any(weights):
        weights = list(rooms) if any(rooms) else [1] * len(rooms)
    shares = [blocks * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index])
    for index in by_remainder[: blocks - sum(counts)]:
        counts[index] += 1
    return counts


def _shared(free: FreeMemory, times: int) -> FreeMemory:
    return FreeMemory(free.bytes // times, free.limit_bytes, free.limited_by)
