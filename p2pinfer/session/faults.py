"""Faults of a session's chain, noted by whoever finds them, and the error that ends the session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from p2pinfer.errors import PeerError
from p2pinfer.node.concurrency.pulse import Pulse

from .hop_stream import HopStream
from .reporter import Reporter


class Faults:
    """The only owner of what has failed: others note and ask.

    Attributes:
        failed: The hops to be replaced and why, in the order in which they failed.
        cut: The hops that the one before them does not reach.
        excluded: The peers that failed the session or left it; it does not use them again.
        fatal: Why nothing is to be mended any more; None while the session goes on.
    """

    def __init__(self, excluded: frozenset[str], reporter: Reporter) -> None:
        self._failed: dict[HopStream, PeerError] = {}
        self._cut: dict[HopStream, PeerError] = {}
        self.failed: Mapping[HopStream, PeerError] = MappingProxyType(self._failed)
        self.cut: Mapping[HopStream, PeerError] = MappingProxyType(self._cut)
        self.excluded = excluded
        self.fatal: Exception | None = None
        self._reporter = reporter
        self._noted = Pulse()

    @property
    def first(self) -> PeerError | None:
        """First failure among those that are not mended; None if nothing is broken."""
        return next(iter((*self._failed.values(), *self._cut.values())), None)

    def note_failed(self, hop: HopStream, error: PeerError) -> None:
        """Note that a hop has to be replaced. The first reason given counts."""
        if hop not in self._failed:
            self._failed[hop] = error
            self._reporter.failed(hop, error)
        self._noted.fire()

    def note_cut(self, hop: HopStream, error: PeerError) -> None:
        """Note that the hop before does not reach this one. The first reason given counts."""
        if hop not in self._cut:
            self._cut[hop] = error
            self._reporter.failed(hop, error)
        self._noted.fire()

    def note_joined(self, hop: HopStream) -> None:
        """Note that the hop before reaches this one, or that it is no longer the question."""
        self._cut.pop(hop, None)

    def note_replaced(self, hops: Iterable[HopStream]) -> None:
        """Note that others have taken the place of these hops."""
        for hop in hops:
            self.exclude(hop.peer_id)
            self._failed.pop(hop, None)
            self._cut.pop(hop, None)

    def exclude(self, *peer_ids: str) -> None:
        """Use these peers no more in this session."""
        self.excluded |= {*peer_ids}

    def give_up(self, error: Exception) -> None:
        """Let the session be over. The first reason given counts."""
        if self.fatal is None:
            self.fatal = error
        self._noted.fire()

    async def any(self) -> None:
        """Wait until something is broken, or the session is over."""
        while self.first is None and self.fatal is None:
            await self._noted.wait()
