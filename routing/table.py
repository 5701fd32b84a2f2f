"""Table of the swarm: the latest announcement of every peer until it expires.

Theory of operation. One entry per (revision, peer) holds the record with the highest sequence number. It
is live until its ttl has run out on our own clock, counted from when it was made as far as we know (now,
less the age a neighbour's snapshot gives it). Nobody's wall clock matters.

Two kinds of entries are kept though they are not live, because an older record of the same peer may still
be under way, or may be replayed on purpose to raise a ghost: a goodbye, and an expired record. Both go
`remember_s` after their ttl. Until then only a higher sequence number brings the peer back.

What a stranger can fill is bounded: one entry per peer and revision, a few revisions per peer, so many per
revision and in total. Beyond that `Shares` says who goes: never a peer that this process has met, and else
one of whoever told us of the most. What an announcement claims, its lifetime above all, counts for nothing.

Of foreign models, those that this process neither serves nor asks for, a few entries each are kept, so that
it can introduce their peers to each other. The latest word comes in and the oldest goes. Where there are too
many such models, one goes of whoever has told us of the most: who invents them pushes out its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from .address_ranges import crowded_range
from .announcement import Announcement
from .config import TableConfig
from .hearsay import Hearsay
from .met_peers import MetPeers

MAX_TELLERS = 4  # of one peer that are remembered
SEVERAL = 2  # tellers that are more than one's word


@dataclass(frozen=True, slots=True)
class _Entry:
    announcement: Announcement
    record: bytes
    made_at: float  # on our clock
    expires_at: float
    told: _Told
    address_range: str  # empty: none that is only this peer's

    @property
    def key(self) -> tuple[str, str]:
        return (self.announcement.revision, self.announcement.peer_id)


@dataclass(slots=True)
class _Told:
    """Sources of what is known of a peer and model. They stay when the peer announces itself anew."""

    first: str  # who told us first; empty: nobody in particular
    number: int  # of all such first words, in the order they came
    by: set[str]  # who told us, a few of them


class SwarmTable:
    """Announcements by revision and peer. Every method takes `now`, seconds of one monotonic clock."""

    def __init__(self, config: TableConfig | None = None) -> None:
        self._config = config or TableConfig()
        self._entries: dict[str, dict[str, _Entry]] = {}  # revision -> peer id -> entry
        self._revisions: dict[str, set[str]] = {}  # peer id -> revisions it has entries for
        self._foreign: dict[str, str] = {}  # revision that is not ours -> who told us of it first
        self._told: dict[str, dict[tuple[str, str], _Entry]] = {}  # who told us first -> entries
        self._heard = 0  # first words so far
        self.met = MetPeers(self._config.max_met, self._config.max_met_per_range)

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def accept(
        self,
        announcement: Announcement,
        record: bytes,
        now: float,
        age_s: float = 0.0,
        *,
        foreign: bool = False,
        told_by: str = "",
    ) -> bool:
        """Take in a record whose signature was checked.

        Args:
            record: The signed bytes, to be passed on in snapshots.
            age_s: How old the record was when we got it, by the word of whoever handed it over.
            foreign: It is of a model that this process has nothing to do with.
            told_by: Who handed it over.

        Returns:
            Whether it was news. If not, nothing that is believed has changed.
        """
        age_s = max(age_s, 0.0)
        if len(record) > self._config.max_record_bytes or not age_s < announcement.ttl_s:
            return False
        key = announcement.revision, announcement.peer_id
        known = self._find(*key)
        if known is not None and self._is_forgotten(known, now):
            self._remove(known)
            known = None
        if known is not None and told_by and len(known.told.by) < MAX_TELLERS:
            known.told.by.add(told_by)
        if known is not None and known.announcement.sequence >= announcement.sequence:
            return False
        if known is None:
            self._heard += 1
        told = known.told if known else _Told(told_by, self._heard, {told_by})
        place = crowded_range(announcement.addrs)
        entry = _Entry(announcement, record, now - age_s, now - age_s + announcement.ttl_s, told, place)
        self._insert(entry)
        if foreign:
            self._foreign.setdefault(announcement.revision, told_by)
            self._make_room_among_foreign(entry)
        else:
            self._foreign.pop(announcement.revision, None)
        self._make_room(entry, now)
        return self._find(*key) is entry

    def live(self, revision: str, now: float) -> list[Announcement]:
        """The peers that serve `revision`, in the order of their ids."""
        entries = self._entries.get(revision, {})
        return [
            entries[peer_id].announcement for peer_id in sorted(entries) if _is_live(entries[peer_id], now)
        ]

    def find(self, revision: str, peer_id: str, now: float) -> Announcement | None:
        """Announcement of a peer for `revision`, if it serves that."""
        entry = self._find(revision, peer_id)
        return entry.announcement if entry is not None and _is_live(entry, now) else None

    def hearsay(self, revision: str, now: float) -> list[Hearsay]:
        """The peers that serve `revision`, with how we came to know of each."""
        return [
            Hearsay(
                entry.announcement,
                entry.told.first,
                entry.told.number,
                len(entry.told.by),
                entry.address_range,
            )
            for entry in self._entries.get(revision, {}).values()
            if _is_live(entry, now)
        ]

    def teller(self, peer_id: str) -> str:
        """The peer that told us of another first; empty if none did."""
        entries = (self._entries[revision][peer_id] for revision in self._revisions.get(peer_id, ()))
        return next((entry.told.first for entry in entries), "")

    def addrs_of(self, peer_id: str, now: float) -> tuple[str, ...]:
        """Addresses of a peer's latest announcement that is live, of whatever model."""
        entries = (self._entries[revision][peer_id] for revision in self._revisions.get(peer_id, ()))
        live = [entry.announcement for entry in entries if _is_live(entry, now)]
        return max(live, key=lambda each: each.sequence).addrs if live else ()

    def well_known(self, now: float, revision: str | None = None) -> list[tuple[bytes, float]]:
        """Signed records, with ages, of peers that were met or that several have told of."""
        return [
            (entry.record, now - entry.made_at)
            for each in ([revision] if revision else list(self._entries))
            for entry in self._current(each, now)
            if entry.announcement.peer_id in self.met or len(entry.told.by) >= SEVERAL
        ]

    def records(self, now: float, revision: str | None = None) -> list[tuple[bytes, float]]:
        """Signed records and their ages in seconds, to be handed to a newcomer.

        Of peers that we have met first, then in turns of those who told of them, the youngest first of each:
        where there is room for only so much, here or there, no inventor's come before the others. Goodbyes
        are among them: without one, the newcomer would believe a neighbour that missed it. Of all models, the
        first few of each come before the rest, for who asks may serve the rarest.
        """
        if revision is not None:
            return [(entry.record, now - entry.made_at) for entry in self._current(revision, now)]
        of_each = [self._current(each, now) for each in self._entries]
        few = self._config.max_foreign_entries
        first = chain.from_iterable(entries[:few] for entries in of_each)
        rest = chain.from_iterable(entries[few:] for entries in of_each)
        return [(entry.record, now - entry.made_at) for part in (first, rest) for entry in self._ranked(part)]

    def records_of(self, peer_id: str, now: float) -> list[tuple[bytes, float]]:
        """All that is remembered of one peer, with ages in seconds, expired or not.

        Whoever has lost count of its announcements sees in them how far it had come.
        """
        entries = (self._entries[revision][peer_id] for revision in self._revisions.get(peer_id, ()))
        return [(entry.record, now - entry.made_at) for entry in entries]

    def revisions(self, now: float) -> dict[str, int]:
        """The revisions somebody serves, and by how many peers."""
        counts = {
            revision: sum(_is_live(entry, now) for entry in entries.values())
            for revision, entries in self._entries.items()
        }
        return {revision: count for revision, count in counts.items() if count}

    def forget_expired(self, now: float) -> None:
        """Free what nothing depends on any more. To be called now and then; it changes no answer."""
        for entry in [entry for entry in self._all() if self._is_forgotten(entry, now)]:
            self._remove(entry)

    def _current(self, revision: str, now: float) -> list[_Entry]:
        """Announcements of a revision that have not expired, in the order in which they are handed on."""
        entries = self._entries.get(revision, {}).values()
        return self._ranked(entry for entry in entries if now < entry.expires_at)

    def _ranked(self, entries: Iterable[_Entry]) -> list[_Entry]:
        """Entries of peers met first, then of every teller in turn; the youngest first of each."""
        youngest_first = sorted(entries, key=lambda entry: -entry.made_at)
        turns = Counter[str]()
        ranked: list[tuple[bool, int, _Entry]] = []
        for entry in youngest_first:
            is_met = entry.announcement.peer_id in self.met
            turns[entry.told.first] += not is_met
            ranked.append((not is_met, 0 if is_met else turns[entry.told.first], entry))
        return [entry for *_, entry in sorted(ranked, key=lambda each: each[:2])]

    def _is_forgotten(self, entry: _Entry, now: float) -> bool:
        return entry.expires_at + self._config.remember_s <= now

    def _find(self, revision: str, peer_id: str) -> _Entry | None:
        return self._entries.get(revision, {}).get(peer_id)

    def _all(self) -> Iterator[_Entry]:
        return (entry for entries in self._entries.values() for entry in entries.values())

    def _insert(self, entry: _Entry) -> None:
        revision, peer_id = entry.key
        self._entries.setdefault(revision, {})[peer_id] = entry
        self._revisions.setdefault(peer_id, set()).add(revision)
        self._told.setdefault(entry.told.first, {})[entry.key] = entry

    def _remove(self, entry: _Entry) -> None:
        revision, peer_id = entry.key
        told = self._told[entry.told.first]
        del told[entry.key]
        if not told:
            del self._told[entry.told.first]
        del self._entries[revision][peer_id]
        if not self._entries[revision]:
            del self._entries[revision]
            self._foreign.pop(revision, None)
        self._revisions[peer_id].discard(revision)
        if not self._revisions[peer_id]:
            del self._revisions[peer_id]

    def _make_room_among_foreign(self, newest: _Entry) -> None:
        """Drop the oldest word about its model, and a model of whoever told us of the most."""
        entries = self._entries[newest.announcement.revision]
        if len(entries) > self._config.max_foreign_entries:
            others = (entry for entry in entries.values() if entry is not newest)
            self._remove(min(others, key=lambda entry: entry.made_at))
        if len(self._foreign) > self._config.max_foreign_revisions:
            told = Counter(self._foreign.values())
            busiest = max(told, key=lambda peer_id: told[peer_id])
            of_it = [revision for revision, told_by in self._foreign.items() if told_by == busiest]
            oldest = min(of_it, key=lambda each: max(entry.made_at for entry in self._entries[each].values()))
            for entry in list(self._entries[oldest].values()):
                self._remove(entry)

    def _make_room(self, newest: _Entry, now: float) -> None:
        """Drop an entry wherever `newest` went over a bound."""
        revision, peer_id = newest.key
        own = self._revisions.get(peer_id, set())
        if len(own) > self._config.max_revisions_per_peer:
            self._remove(_first_to_expire(self._entries[name][peer_id] for name in own))
        if len(self._entries.get(revision, {})) > self._config.max_entries_per_revision:
            self._remove(self._least_wanted(now, revision))
        if len(self) > self._config.max_entries:
            self._remove(self._least_wanted(now))

    def _least_wanted(self, now: float, revision: str | None = None) -> _Entry:
        """The entry to drop: of a peer tried in vain, else one that has run out, else one of the neighbour
        that told us of the most; only if all were met, whichever expires first."""
        for peer_id in self.met.failed():
            for name in self._revisions.get(peer_id, ()):
                if revision in (None, name):
                    return self._entries[name][peer_id]
        shares = [self._unmet(entries.values(), revision) for entries in self._told.values()]
        past = [entry for share in shares for entry in share if not _is_live(entry, now)]
        if past:
            return _first_to_expire(past)
        if largest := max(shares, key=len, default=[]):
            return _of_a_crowd(largest)
        return _first_to_expire(entry for entry in self._all() if revision in (None, entry.key[0]))

    def _unmet(self, entries: Iterable[_Entry], revision: str | None) -> list[_Entry]:
        return [
            entry
            for entry in entries
            if revision in (None, entry.key[0]) and entry.announcement.peer_id not in self.met
        ]


def _of_a_crowd(entries: Sequence[_Entry]) -> _Entry:
    """The entry of the most crowded address range that came last, of those that the fewest have told of."""
    crowd = Counter(entry.address_range for entry in entries if entry.address_range)
    return max(
        entries,
        key=lambda entry: (crowd[entry.address_range], -len(entry.told.by), entry.told.number),
    )


def _is_live(entry: _Entry, now: float) -> bool:
    return now < entry.expires_at and not entry.announcement.leaving


def _first_to_expire(entries: Iterable[_Entry]) -> _Entry:
    return min(entries, key=lambda entry: (entry.expires_at, entry.key))
