"""Announcements in tests."""

from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.table import SwarmTable

A, B, C = "a" * 32, "b" * 32, "c" * 32


def announcement(
    peer_id: str = "peer",
    sequence: int = 1,
    revision: str = A,
    ttl_s: float = 100.0,
    leaving: bool = False,
) -> Announcement:
    return Announcement(
        peer_id,
        "model",
        revision,
        BlockSpan(0, 4),
        "float32",
        10.0,
        1000,
        sequence,
        ttl_s=ttl_s,
        leaving=leaving,
    )


def peers(table: SwarmTable, now: float, revision: str = A) -> list[str]:
    return [live.peer_id for live in table.live(revision, now)]
