from dataclasses import dataclass, replace
from math import inf, nan

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import TableConfig
from p2pinfer.routing.table import SwarmTable

from .announcements import A, B, C, announcement, peers


def test_a_newer_announcement_replaces_an_older_one() -> None:
    table = SwarmTable()
    assert table.accept(announcement(sequence=1), b"one", now=0.0)
    assert table.accept(announcement(sequence=2), b"two", now=1.0)
    assert [live.sequence for live in table.live(A, 2.0)] == [2]
    assert table.records(2.0) == [(b"two", 1.0)]


def test_an_older_or_equal_announcement_is_no_news() -> None:
    table = SwarmTable()
    table.accept(announcement(sequence=2), b"two", now=0.0)
    assert not table.accept(announcement(sequence=1), b"one", now=1.0)
    assert not table.accept(announcement(sequence=2), b"again", now=1.0)
    assert table.records(1.0) == [(b"two", 1.0)]


def test_an_announcement_lives_for_its_ttl() -> None:
    table = SwarmTable()
    table.accept(announcement(ttl_s=100.0), b"", now=10.0)
    assert peers(table, 109.9) == ["peer"]
    assert peers(table, 110.0) == []
    assert table.records(110.0) == []


def test_the_age_of_a_record_from_a_snapshot_counts() -> None:
    table = SwarmTable()
    assert table.accept(announcement(ttl_s=100.0), b"old", now=10.0, age_s=60.0)
    assert table.records(10.0) == [(b"old", 60.0)]
    assert peers(table, 49.9) == ["peer"]
    assert peers(table, 50.0) == []


def test_a_record_that_has_run_out_or_whose_age_is_nonsense_is_refused() -> None:
    table = SwarmTable()
    assert not table.accept(announcement(ttl_s=100.0), b"", now=0.0, age_s=100.0)
    assert not table.accept(announcement(ttl_s=100.0), b"", now=0.0, age_s=nan)
    assert table.accept(announcement(ttl_s=100.0), b"", now=0.0, age_s=-1e9)
    assert peers(table, 100.0) == []


def test_a_peer_that_leaves_is_gone_at_once_and_cannot_be_brought_back_by_an_older_record() -> None:
    table = SwarmTable()
    table.accept(announcement(sequence=1), b"here", now=0.0)
    assert table.accept(announcement(sequence=3, leaving=True), b"bye", now=1.0)
    assert peers(table, 1.0) == []
    assert not table.accept(announcement(sequence=2), b"late", now=2.0)
    assert table.accept(announcement(sequence=4), b"back", now=3.0)
    assert peers(table, 3.0) == ["peer"]


def test_a_goodbye_is_handed_to_newcomers_too() -> None:
    table = SwarmTable()
    table.accept(announcement(sequence=3, leaving=True), b"bye", now=1.0)
    assert table.records(2.0) == [(b"bye", 1.0)]


def test_an_expired_record_that_is_replayed_raises_no_ghost() -> None:
    table = SwarmTable(TableConfig(remember_s=600.0))
    table.accept(announcement(sequence=5, ttl_s=100.0), b"", now=0.0)
    assert not table.accept(announcement(sequence=5), b"replayed", now=150.0)
    assert table.accept(announcement(sequence=6), b"restarted", now=151.0)


def test_what_is_long_past_is_forgotten() -> None:
    table = SwarmTable(TableConfig(remember_s=600.0))
    table.accept(announcement(sequence=5, ttl_s=100.0), b"", now=0.0)
    table.forget_expired(699.0)
    assert len(table) == 1
    table.forget_expired(700.0)
    assert len(table) == 0
    assert table.accept(announcement(sequence=1), b"", now=700.0)


def test_what_is_long_past_counts_for_nothing_even_before_it_is_freed() -> None:
    table = SwarmTable(TableConfig(remember_s=600.0))
    table.accept(announcement(sequence=5, ttl_s=100.0), b"", now=0.0)
    assert not table.accept(announcement(sequence=1), b"", now=699.0)
    assert table.accept(announcement(sequence=1), b"", now=700.0)


def test_snapshots_are_youngest_first_and_by_revision_if_asked() -> None:
    table = SwarmTable()
    table.accept(announcement("p", revision=A), b"p", now=0.0)
    table.accept(announcement("q", revision=B), b"q", now=2.0)
    table.accept(announcement("r", revision=A), b"r", now=1.0)
    assert table.records(3.0) == [(b"q", 1.0), (b"r", 2.0), (b"p", 3.0)]
    assert table.records(3.0, A) == [(b"r", 2.0), (b"p", 3.0)]
    assert table.records(3.0, C) == []


def test_revisions_are_those_that_somebody_serves() -> None:
    table = SwarmTable()
    table.accept(announcement("p", revision=A), b"", now=0.0)
    table.accept(announcement("q", revision=A), b"", now=0.0)
    table.accept(announcement("p", revision=B, ttl_s=10.0), b"", now=0.0)
    table.accept(announcement("q", revision=C, leaving=True), b"", now=0.0)
    assert table.revisions(5.0) == {A: 2, B: 1}
    assert table.revisions(10.0) == {A: 2}


@dataclass(frozen=True)
class Heard:
    announcement: Announcement
    made_at: float
    number: int  # of the first word of its peer and model

    @property
    def expires_at(self) -> float:
        return self.made_at + self.announcement.ttl_s


class TableAgainstModel(RuleBasedStateMachine):
    """The table does what a list of everything that was ever accepted would."""

    def __init__(self) -> None:
        super().__init__()
        self.config = TableConfig(
            max_entries=5, max_entries_per_revision=3, max_revisions_per_peer=2, remember_s=60.0
        )
        self.table = SwarmTable(self.config)
        self.model: list[Heard] = []
        self.now = 0.0
        self.heard = 0

    @rule(pause_s=st.sampled_from([0.0, 1.0, 20.0, 200.0]))
    def wait(self, pause_s: float) -> None:
        self.now += pause_s

    @rule()
    def forget(self) -> None:
        self.table.forget_expired(self.now)

    @rule(
        peer_id=st.sampled_from("pqrst"),
        revision=st.sampled_from([A, B, C]),
        sequence=st.integers(0, 6),
        # Irrational steps, so that no two entries expire at the same moment.
        ttl_s=st.integers(1, 60).map(lambda n: 5.0 + n * 2**0.5),
        age_s=st.sampled_from([0.0, 3.0, 30.0]),
        leaving=st.booleans(),
    )
    def accept(
        self, peer_id: str, revision: str, sequence: int, ttl_s: float, age_s: float, leaving: bool
    ) -> None:
        offered = announcement(peer_id, sequence, revision, ttl_s, leaving)
        assert self.table.accept(offered, b"", self.now, age_s) == self.accept_in_model(offered, age_s)

    def accept_in_model(self, offered: Announcement, age_s: float) -> bool:
        self.model = [heard for heard in self.model if heard.expires_at + self.config.remember_s > self.now]
        self.heard += 1
        newest = Heard(offered, self.now - age_s, self.heard)
        same = [heard for heard in self.model if key(heard) == key(newest)]
        if same:
            newest = replace(newest, number=same[0].number)
        if newest.expires_at <= self.now or any(
            old.announcement.sequence >= offered.sequence for old in same
        ):
            return False
        self.model = [heard for heard in self.model if heard not in same] + [newest]
        self.drop([heard for heard in self.model if key(heard)[1] == offered.peer_id], 2)
        self.drop([heard for heard in self.model if key(heard)[0] == offered.revision], 3, self.now)
        self.drop(self.model, 5, self.now)
        return newest in self.model

    def drop(self, among: list[Heard], most: int, now: float = inf) -> None:
        """Of those that have run out by `now` the first to do so, else the last that was told of."""
        if len(among) <= most:
            return
        past = [
            heard for heard in among if heard.expires_at <= now or heard.announcement.leaving or now == inf
        ]
        if past:
            self.model.remove(min(past, key=lambda heard: (heard.expires_at, key(heard))))
        else:
            self.model.remove(max(among, key=lambda heard: heard.number))

    @invariant()
    def agrees(self) -> None:
        current = [heard for heard in self.model if heard.expires_at > self.now]
        for revision in (A, B, C):
            expected = {
                heard.announcement.peer_id: heard.announcement
                for heard in current
                if heard.announcement.revision == revision and not heard.announcement.leaving
            }
            assert {live.peer_id: live for live in self.table.live(revision, self.now)} == expected
            assert self.table.revisions(self.now).get(revision, 0) == len(expected)
        assert sorted(age for _, age in self.table.records(self.now)) == sorted(
            self.now - heard.made_at for heard in current
        )
        assert len(self.table) <= 5


def key(heard: Heard) -> tuple[str, str]:
    return heard.announcement.revision, heard.announcement.peer_id


TestTableAgainstModel = TableAgainstModel.TestCase
TestTableAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
