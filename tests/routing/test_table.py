from dataclasses import dataclass, replace
from math import inf, nan

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pinfer.models.span import BlockSpan
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import TableConfig
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


def invented(number: int, sequence: int = 1, addrs: tuple[str, ...] = ()) -> Announcement:
    return replace(announcement(f"x{number}", sequence, ttl_s=300.0), addrs=addrs)


def test_a_full_table_lets_nobody_push_others_out_by_the_lifetime_it_claims() -> None:
    table = SwarmTable(TableConfig(max_entries_per_revision=3))
    for number in range(3):
        assert table.accept(announcement(f"p{number}", ttl_s=50.0), b"", now=0.0, told_by="one")
    for number in range(10):
        assert not table.accept(invented(number), b"", now=1.0, told_by="one")
    assert peers(table, 1.0) == ["p0", "p1", "p2"]


def test_room_in_a_full_table_is_shared_by_those_who_told_of_it() -> None:
    """Whoever has told of the most gives way: to a peer told of by another, not to more of its own."""
    table = SwarmTable(TableConfig(max_entries_per_revision=100))
    for number in range(1000):
        table.accept(invented(number), b"", now=0.0, told_by="evil")
    for number in range(60):
        assert table.accept(announcement(f"p{number}"), b"", now=1.0, told_by="one") == (number < 50)
    assert sum(peer.startswith("p") for peer in peers(table, 1.0)) == 50
    assert not table.accept(invented(2000), b"", now=2.0, told_by="evil")
    assert table.accept(announcement("q"), b"", now=2.0, told_by="another")
    assert table.teller("q") == "another"


def test_room_of_one_teller_is_shared_by_address_range() -> None:
    """A neighbour that was deceived hands on what it was told, with the honest among it."""
    table = SwarmTable(TableConfig(max_entries_per_revision=10))
    for number in range(9):
        told = invented(number, addrs=(f"/ip4/198.51.100.{number}/tcp/1",))
        assert table.accept(told, b"", now=0.0, told_by="one")
    for number in range(5):
        told = replace(announcement(f"p{number}"), addrs=(f"/ip4/11.0.{number}.1/tcp/1",))
        assert table.accept(told, b"", now=1.0, told_by="one")
    assert sum(peer.startswith("p") for peer in peers(table, 1.0)) == 5


def test_no_stranger_takes_the_place_of_a_peer_that_was_met() -> None:
    table = SwarmTable(TableConfig(max_entries_per_revision=4, max_entries=4))
    for number in range(3):
        table.met.note(f"p{number}", f"range {number}")
        table.accept(announcement(f"p{number}", ttl_s=10.0), b"", now=0.0, told_by="evil")
    for number in range(1000):
        table.accept(invented(number), b"", now=1.0, told_by=f"evil {number}")
    assert [peer for peer in peers(table, 1.0) if peer.startswith("p")] == ["p0", "p1", "p2"]
    assert len(table) == 4


def test_a_peer_that_was_met_always_finds_room() -> None:
    table = SwarmTable(TableConfig(max_entries_per_revision=4))
    for number in range(4):
        table.accept(invented(number), b"", now=0.0, told_by=f"{number}")
    table.met.note("p", "range")
    assert table.accept(announcement("p"), b"", now=1.0, told_by="one")


def test_what_was_tried_in_vain_goes_first() -> None:
    table = SwarmTable(TableConfig(max_entries_per_revision=3))
    for number in range(2):
        table.accept(announcement(f"p{number}"), b"", now=0.0, told_by="one")
    table.accept(invented(0), b"", now=0.0, told_by="another")
    table.met.note_failed("x0")
    assert table.accept(announcement("p2"), b"", now=1.0, told_by="one")
    assert peers(table, 1.0) == ["p0", "p1", "p2"]
    assert not table.accept(invented(0, sequence=2), b"", now=2.0, told_by="another")


def test_a_neighbour_is_told_first_of_peers_that_were_met() -> None:
    table = SwarmTable()
    table.accept(announcement("p"), b"met", now=0.0)
    table.accept(announcement("q"), b"younger", now=1.0)
    table.met.note("p", "")
    assert [record for record, _ in table.records(2.0, A)] == [b"met", b"younger"]
    assert [record for record, _ in table.records(2.0)] == [b"met", b"younger"]


def test_of_peers_that_were_not_met_those_who_told_of_them_take_turns() -> None:
    table = SwarmTable()
    for number in range(3):
        table.accept(announcement(f"p{number}"), b"p%d" % number, now=float(number), told_by="one")
    for number in range(30):
        table.accept(invented(number), b"x%d" % number, now=3.0 + number, told_by="evil")
    records = [record for record, _ in table.records(40.0, A)]
    assert records[:7] == [b"x29", b"p2", b"x28", b"p1", b"x27", b"p0", b"x26"]


def test_how_a_peer_came_to_be_known_outlives_its_announcements() -> None:
    table = SwarmTable()
    table.accept(announcement("p"), b"", now=0.0, told_by="one")
    assert not table.accept(announcement("p"), b"", now=1.0, told_by="two")
    table.accept(announcement("q"), b"", now=1.0, told_by="two")
    table.accept(announcement("p", sequence=2), b"", now=2.0, told_by="three")
    heard = {each.announcement.peer_id: each for each in table.hearsay(A, 3.0)}
    assert (heard["p"].teller, heard["p"].number, heard["p"].tellers) == ("one", 1, 3)
    assert (heard["q"].teller, heard["q"].number, heard["q"].tellers) == ("two", 2, 1)


def test_of_a_foreign_model_the_latest_few_are_kept() -> None:
    table = SwarmTable(TableConfig(max_foreign_entries=3))
    for i in range(10):
        assert table.accept(announcement(f"p{i}"), b"", now=float(i), foreign=True)
    assert peers(table, 10.0) == ["p7", "p8", "p9"]
    for i in range(10):  # once the model is ours there is room for all
        assert table.accept(announcement(f"p{i}", sequence=2), b"", now=11.0)
    assert len(peers(table, 12.0)) == 10


def test_who_invents_foreign_models_pushes_out_its_own() -> None:
    table = SwarmTable(TableConfig(max_foreign_revisions=4))
    table.accept(announcement("ours"), b"", now=0.0)
    for i, name in enumerate((B, C)):
        table.accept(announcement("honest", revision=name), b"", now=float(i), foreign=True, told_by="honest")
    for i in range(50):
        told = announcement(f"p{i}", revision=f"{i:032x}")
        assert table.accept(told, b"", now=2.0 + i, foreign=True, told_by="liar")
    assert {A, B, C} < set(table.revisions(60.0))
    assert len(table.revisions(60.0)) == 5


def test_a_table_of_all_models_begins_with_a_few_of_each() -> None:
    table = SwarmTable(TableConfig(max_foreign_entries=2))
    table.accept(announcement("rare", revision=B), b"rare", now=0.0)
    for i in range(5):
        table.accept(announcement(f"p{i}"), b"%d" % i, now=1.0 + i)
    assert [record for record, _ in table.records(6.0)] == [b"4", b"3", b"rare", b"2", b"1", b"0"]


def test_what_is_remembered_of_a_peer_outlives_its_expiry() -> None:
    table = SwarmTable()
    table.accept(announcement("p", sequence=7, ttl_s=60.0), b"p", now=0.0)
    table.accept(announcement("p", sequence=8, revision=B, leaving=True), b"q", now=0.0)
    assert sorted(table.records_of("p", 100.0)) == [(b"p", 100.0), (b"q", 100.0)]
    assert table.records(100.0, A) == []
    assert table.records_of("q", 100.0) == []


def test_the_table_as_a_whole_is_bounded() -> None:
    table = SwarmTable(TableConfig(max_entries=3))
    for i in range(10):
        table.accept(announcement(f"p{i}", revision=f"{i:032x}", ttl_s=100.0 + i), b"", now=0.0)
    assert len(table) == 3


def test_one_peer_has_a_few_revisions_and_pushes_out_only_its_own() -> None:
    table = SwarmTable(TableConfig(max_revisions_per_peer=2, max_entries=10))
    table.accept(announcement("honest"), b"", now=0.0)
    for i in range(50):
        table.accept(announcement("greedy", sequence=i, revision=f"{i:032x}", ttl_s=300.0), b"", now=float(i))
    assert len(table) == 3
    assert peers(table, 50.0) == ["honest"]


def test_an_oversized_record_is_refused() -> None:
    table = SwarmTable(TableConfig(max_record_bytes=10))
    assert not table.accept(announcement(), b"x" * 11, now=0.0)
    assert table.accept(announcement(), b"x" * 10, now=0.0)


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


def test_the_order_of_live_peers_does_not_depend_on_arrival() -> None:
    forward, backward = SwarmTable(), SwarmTable()
    offers = [replace(announcement(), peer_id=peer_id) for peer_id in "zkab"]
    for offer in offers:
        forward.accept(offer, b"", 0.0)
    for offer in reversed(offers):
        backward.accept(offer, b"", 0.0)
    assert forward.live(A, 1.0) == backward.live(A, 1.0)
