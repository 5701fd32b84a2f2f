"""Whose records a full table keeps."""

from dataclasses import replace

from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import TableConfig
from p2pinfer.routing.table import SwarmTable

from .announcements import A, B, C, announcement, peers


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


def test_the_order_of_live_peers_does_not_depend_on_arrival() -> None:
    forward, backward = SwarmTable(), SwarmTable()
    offers = [replace(announcement(), peer_id=peer_id) for peer_id in "zkab"]
    for offer in offers:
        forward.accept(offer, b"", 0.0)
    for offer in reversed(offers):
        backward.accept(offer, b"", 0.0)
    assert forward.live(A, 1.0) == backward.live(A, 1.0)
