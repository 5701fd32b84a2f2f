"""Accounts of one download: bytes that came, by peer, and lies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.progress import Progress, Silent

from .file_job import MAX_LIES, FileJob, Source

logger = logging.getLogger(__name__)

OnLie: TypeAlias = Callable[[str, str, bool], None]


@dataclass(slots=True)
class Brought:
    """Bytes and lies, by peer."""

    bytes: dict[str, int] = field(default_factory=dict[str, int])  # right ones, by peer
    liars: dict[str, str] = field(default_factory=dict[str, str])  # what each was wrong about, by peer
    resumed_bytes: int = 0  # that were here already


class Accounts:
    """Keeps a `Brought`, and tells of bytes and lies.

    Args:
        on_lie: Told of each lie: by whom, about what, and if it is certain. One wrong chunk is not, since
            memory without error correction turns a bit over now and then; a second one is.
    """

    def __init__(self, on_lie: OnLie) -> None:
        self.brought = Brought()
        self.progress: Progress = Silent()
        self._on_lie = on_lie

    def note_right(self, source: Source, job: FileJob, indices: Sequence[int]) -> None:
        """These chunks have come and are written."""
        fresh = job.note_right(source, indices)
        if fresh:
            self.brought.bytes[source.peer_id] = self.brought.bytes.get(source.peer_id, 0) + fresh
            self.progress.advance(fresh)

    def give_up(self, source: Source, why: ProtocolViolation) -> None:
        """Ask the peer for nothing more. It may be of another version, so nothing is held against it."""
        source.lies = MAX_LIES
        logger.info("peer %s is asked for no weights any more: %s", source.peer_id, why)

    def note_lie(self, source: Source, why: str) -> None:
        """The peer was proved to lie, as its `lies` say already."""
        is_first = source.peer_id not in self.brought.liars
        self.brought.liars.setdefault(source.peer_id, why)
        if is_first:
            logger.warning("peer %s %s", source.peer_id, why)
        self._on_lie(source.peer_id, why, source.lies > 1)
