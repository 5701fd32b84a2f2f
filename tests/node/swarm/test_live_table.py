from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.swarm.duplicate_identity import DuplicateDetector
from p2pinfer.node.swarm.live_table import LiveTable, open_announcement
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.transport.identity import Identity, new_identity
from p2pinfer.routing.announcement import Announcement, encode_announcement
from p2pinfer.routing.table import SwarmTable

REVISION = "0" * 32


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def identity() -> Identity:
    return new_identity()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def view(clock: Clock) -> LiveTable:
    return LiveTable(clock=clock)


def offer(identity: Identity, sequence: int = 1, revision: str = REVISION) -> Announcement:
    return Announcement(
        peer_id=identity.peer_id,
        model="tiny-stories",
        revision=revision,
        span=BlockSpan(0, 4),
        dtype="float32",
        tokens_per_s=10.0,
        free_cache_tokens=100,
        sequence=sequence,
        ttl_s=60.0,
    )


async def test_what_is_published_is_believed_and_can_be_passed_on(
    view: LiveTable, identity: Identity
) -> None:
    record = view.publish(identity, offer(identity))
    assert view.live(REVISION) == view.everybody() == [offer(identity)]
    assert view.records() == view.records(REVISION) == [(record, 0.0)]
    elsewhere = LiveTable()
    assert elsewhere.take(record)
    assert elsewhere.live(REVISION) == [offer(identity)]
    assert view.live("f" * 32) == []


async def test_news_wakes_those_who_wait_and_what_is_known_does_not(
    view: LiveTable, identity: Identity
) -> None:
    waited = view.changed
    record = view.publish(identity, offer(identity))
    assert waited.is_set()
    waited = view.changed
    assert not waited.is_set()
    assert not view.take(record)
    assert not waited.is_set()
    assert view.accept(offer(identity, 2), b"record")
    assert waited.is_set()


async def test_only_the_latest_word_of_a_peer_is_known(view: LiveTable, identity: Identity) -> None:
    view.publish(identity, offer(identity, 5))
    assert view.knows(offer(identity, 5))
    assert not view.knows(offer(identity, 4))
    assert view.outdates(offer(identity, 4))
    assert not view.outdates(offer(identity, 5))
    assert not view.knows(offer(new_identity(), 5))
    assert not view.outdates(offer(new_identity(), 4))
    assert not view.knows(offer(identity, 5, revision="f" * 32))


async def test_what_has_run_out_is_neither_believed_nor_passed_on(
    view: LiveTable, identity: Identity, clock: Clock
) -> None:
    record = view.publish(identity, offer(identity))
    clock.now += 59
    assert view.records() == [(record, 59.0)]
    clock.now += 1
    assert not view.live(REVISION)
    assert not view.everybody()
    assert not view.records()


async def test_an_age_by_a_neighbour_s_word_counts(view: LiveTable, identity: Identity, clock: Clock) -> None:
    record = seal(identity, encode_announcement(offer(identity)))
    assert view.take(record, age_s=50.0)
    clock.now += 11
    assert view.live(REVISION) == []
    assert not view.take(seal(identity, encode_announcement(offer(identity, 2))), age_s=60.0)


async def test_a_goodbye_is_believed(view: LiveTable, identity: Identity) -> None:
    view.publish(identity, offer(identity))
    view.publish(identity, replace(offer(identity, 2), leaving=True))
    assert view.live(REVISION) == []
    assert len(view.records()) == 1


async def test_a_record_about_somebody_else_is_refused(view: LiveTable, identity: Identity) -> None:
    forged = seal(new_identity(), encode_announcement(offer(identity)))
    with pytest.raises(ProtocolViolation, match="about somebody else"):
        view.take(forged)
    for record in (b"", forged[:-1], seal(identity, b"no announcement")):
        with pytest.raises(ProtocolViolation):
            open_announcement(record)
    assert view.everybody() == []


async def test_a_view_keeps_time_by_trio_s_clock_and_a_table_of_its_own(identity: Identity) -> None:
    table = SwarmTable()
    view = LiveTable(table)
    view.publish(identity, offer(identity))
    assert table.live(REVISION, trio.current_time()) == [offer(identity)]


async def test_what_others_hold_in_our_name_goes_to_the_watch_and_to_the_count(
    identity: Identity, clock: Clock
) -> None:
    watch = DuplicateDetector(identity.peer_id, clock)
    view, overtaken, suspects = LiveTable(clock=clock, duplicates=watch), list[int](), list[Announcement]()
    view.on_overtaken, watch.on_suspect = overtaken.append, suspects.append
    view.publish(identity, replace(offer(identity, 5), instance=watch.instance))
    assert (overtaken, suspects) == ([], [])
    other = replace(offer(identity, 9), instance=b"somebody")
    view.take(seal(identity, encode_announcement(other)))
    assert (overtaken, suspects) == ([9], [other])
    assert watch.suspect == b"somebody"
    view.take(seal(new := new_identity(), encode_announcement(replace(offer(new, 20), instance=b"them"))))
    assert (overtaken, suspects) == ([9], [other]), "others' records are no affair of theirs"


async def test_of_foreign_models_a_few_peers_are_kept(view: LiveTable) -> None:
    view.is_foreign = lambda revision: revision != REVISION
    for revision in (REVISION, "f" * 32):
        for _ in range(20):
            view.take(seal(each := new_identity(), encode_announcement(offer(each, revision=revision))))
    assert {revision: len(peers) for revision, peers in view.models().items()} == {REVISION: 20, "f" * 32: 8}
