"""Live table of the swarm: admits signed records only, and wakes waiters on news."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.transport.identity import Identity
from p2pinfer.routing.address_ranges import ip_range, is_everywhere
from p2pinfer.routing.announcement import Announcement, decode_announcement, encode_announcement
from p2pinfer.routing.hearsay import Hearsay
from p2pinfer.routing.table import SwarmTable

from .duplicate_identity import DuplicateDetector
from .signed_records import open_record, seal

logger = logging.getLogger(__name__)


class LiveTable:
    """A `SwarmTable` on trio's clock, fed with sealed records."""

    def __init__(
        self,
        table: SwarmTable | None = None,
        clock: Callable[[], float] = trio.current_time,
        duplicates: DuplicateDetector | None = None,
    ) -> None:
        """`duplicates` hears of what others pass on in our own name."""
        self._changed = Pulse()
        self._table = SwarmTable() if table is None else table  # an empty one is falsy
        self._clock = clock
        self.is_foreign: Callable[[str], bool] = lambda revision: (
            False
        )  # whether a model is no affair of ours
        # There is a later record in our name.
        self.on_overtaken: Callable[[int], None] = lambda _: None
        self._duplicates = duplicates
        self._latest_own = b""

    @property
    def changed(self) -> trio.Event:
        """Set with the next piece of news."""
        return self._changed.next

    def take(self, record: bytes, age_s: float = 0.0, told_by: str = "") -> bool:
        """Take in a record that a peer sent; whether it was news.

        Raises:
            ProtocolViolation: As for `open_announcement`.
        """
        return self.accept(open_announcement(record), record, age_s, told_by)

    def publish(self, identity: Identity, announcement: Announcement) -> bytes:
        """Take in our own announcement; returns it sealed, for others."""
        record = self._latest_own = seal(identity, encode_announcement(announcement))
        self._table.met.note(identity.peer_id, "")
        self._accept(announcement, record)
        return record

    def latest_own(self) -> bytes:
        """Our last announcement, sealed; empty if there is none, or it has been taken back."""
        return self._latest_own

    def live(self, revision: str) -> list[Announcement]:
        """The peers that serve `revision` at this moment."""
        return self._table.live(revision, self._clock())

    def everybody(self) -> list[Announcement]:
        """All live announcements, whatever their model."""
        return [peer for revision in self._table.revisions(self._clock()) for peer in self.live(revision)]

    def hearsay(self, revision: str | None = None) -> list[Hearsay]:
        """The peers that serve `revision`, or any model, with how we came to know of each."""
        now = self._clock()
        revisions = self._table.revisions(now) if revision is None else (revision,)
        return [heard for each in revisions for heard in self._table.hearsay(each, now)]

    def teller(self, peer_id: str) -> str:
        """The peer that told us of another first; empty if none did."""
        return self._table.teller(peer_id)

    def addrs_of(self, peer_id: str) -> tuple[str, ...]:
        """Addresses that a peer announced last, of whatever model; empty if it is not known."""
        return self._table.addrs_of(peer_id, self._clock())

    def has_met(self, peer_id: str) -> bool:
        """True if the peer has proved its key to this process."""
        return peer_id in self._table.met

    def note_met(self, peer_id: str, ip: str) -> None:
        """A peer proved its key over a connection to this IP address; empty: over one that has none."""
        found = ip_range(ip)
        self._table.met.note(peer_id, "" if is_everywhere(found) else found)

    def note_failed(self, peer_id: str) -> None:
        """No address of a peer answered."""
        self._table.met.note_failed(peer_id)

    def records(self, revision: str | None = None) -> list[tuple[bytes, float]]:
        """Sealed records with their ages in seconds, youngest first."""
        now = self._clock()
        self._table.forget_expired(now)
        return self._table.records(now, revision)

    def records_of(self, peer_id: str) -> list[tuple[bytes, float]]:
        """All that is remembered of one peer, with ages in seconds, expired or not."""
        return self._table.records_of(peer_id, self._clock())

    def well_known(self, revision: str | None = None) -> list[tuple[bytes, float]]:
        """Sealed records, with ages, of peers that we have met or that several have told of."""
        return self._table.well_known(self._clock(), revision)

    def models(self) -> dict[str, list[Announcement]]:
        """The live announcements that are known, by revision: of foreign models a few of each."""
        return {revision: self.live(revision) for revision in self._table.revisions(self._clock())}

    def knows(self, announcement: Announcement) -> bool:
        """True if this very announcement is what we believe of its peer."""
        return self._sequence_of(announcement) == announcement.sequence

    def outdates(self, announcement: Announcement) -> bool:
        """True if we believe a later announcement of its peer."""
        return self._sequence_of(announcement) > announcement.sequence

    def accept(
        self, announcement: Announcement, record: bytes, age_s: float = 0.0, told_by: str = ""
    ) -> bool:
        """Take in an announcement that `open_announcement` found in `record`; whether it was news.

        Args:
            told_by: Who handed it over.
        """
        if self._duplicates is not None and announcement.peer_id == self._duplicates.peer_id:
            self._duplicates.hear(announcement, age_s)
            self.on_overtaken(announcement.sequence)
        return self._accept(announcement, record, age_s, told_by)

    def _accept(
        self, announcement: Announcement, record: bytes, age_s: float = 0.0, told_by: str = ""
    ) -> bool:
        foreign = self.is_foreign(announcement.revision)
        news = self._table.accept(
            announcement, record, self._clock(), age_s, foreign=foreign, told_by=told_by
        )
        if news:
            logger.debug(
                "swarm.news peer=%s blocks=%s leaving=%s",
                announcement.peer_id,
                announcement.span,
                announcement.leaving,
            )
            self._changed.fire()
        return news

    def _sequence_of(self, announcement: Announcement) -> int:
        """Sequence number of what we believe of the same peer and revision; -1 if that is nothing."""
        known = self._table.find(announcement.revision, announcement.peer_id, self._clock())
        return -1 if known is None else known.sequence


def open_announcement(record: bytes) -> Announcement:
    """The announcement in a sealed record, signed by the peer that it is about.

    Raises:
        ProtocolViolation: The record is malformed, forged, or about somebody else than its author.
    """
    return announcement_by(*open_record(record))


def announcement_by(author: str, payload: bytes) -> Announcement:
    """The announcement that a record's author signed.

    Raises:
        ProtocolViolation: It is malformed, or about somebody else.
    """
    announcement = decode_announcement(payload)
    if announcement.peer_id != author:
        raise ProtocolViolation("an announcement about somebody else", author)
    return announcement
