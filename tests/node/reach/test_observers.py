"""When peers are asked how they see us, and whose answers count. Times are seconds of no real clock."""

from __future__ import annotations

import pytest

from p2pinfer.node.reach.observers import HURRY_S, MAX_OBSERVERS, ROUND_S, SCOUT_S, Observers, contradicts
from p2pinfer.node.reach.reachability import Observation, Reachability, classify

OLD, NEW = "11.0.3.1", "11.0.3.77"
PEERS = [f"peer{number}" for number in range(8)]


def seen(peer_id: str, ip: str, *reached: int) -> Observation:
    return Observation(peer_id, ip, 4001, 4001, reached)


def after_a_round(ip: str = OLD, at: float = 0.0) -> tuple[Observers, Reachability]:
    """Four peers have looked and reached us."""
    observers, believed = Observers(), Reachability()
    observers.begin_round(at)
    for peer_id in PEERS[:MAX_OBSERVERS]:
        observers.note_asked(peer_id)
        observers.note(seen(peer_id, ip, 4001), believed, at)
    return observers, classify(observers.observations.values(), ())


def test_rounds_go_on_however_many_visitors_come() -> None:
    observers, believed = after_a_round()
    for at in range(1, 60):
        fresh, wanted = observers.choose([f"visitor{at}"], at)
        if wanted:
            observers.note_asked(fresh[0])
            observers.note(seen(fresh[0], OLD, 4001), believed, at)
    assert observers.next_round_at() == ROUND_S


def test_a_new_round_replaces_what_was_said_before() -> None:
    observers, believed = after_a_round()
    observers.begin_round(ROUND_S)
    assert classify(observers.observations.values(), ()) == believed  # until somebody has looked
    observers.note(seen("peer0", NEW, 4001), believed, ROUND_S)
    assert classify(observers.observations.values(), ()).outside_ips == (NEW,)


def test_answers_of_a_former_round_alone_are_outdated() -> None:
    observers, believed = after_a_round()
    assert not observers.is_outdated
    observers.begin_round(ROUND_S)
    assert observers.is_outdated
    observers.note(seen("peer0", NEW, 4001), believed, ROUND_S)
    assert not observers.is_outdated
    assert not Observers().is_outdated


def test_a_visitor_who_sees_us_elsewhere_begins_a_round_and_does_not_decide_it() -> None:
    observers, believed = after_a_round()
    fresh, wanted = observers.choose(["visitor"], 20.0)
    assert (fresh, wanted) == (["visitor"], 1)
    observers.note_asked("visitor")
    observers.note(seen("visitor", NEW, 4001), believed, 20.0)
    assert classify(observers.observations.values(), ()).outside_ips == (OLD,)
    assert observers.next_round_at() == 20.0
    observers.begin_round(20.0)
    for peer_id, ip in (("visitor", NEW), ("peer0", OLD), ("peer1", OLD)):
        observers.note(seen(peer_id, ip, *([4001] if ip == OLD else [])), believed, 20.0)
    found = classify(observers.observations.values(), ())
    assert (found.kind, found.outside_ips[:1]) == ("mapped", (NEW,)) or OLD in found.outside_ips


def test_scouts_are_rare() -> None:
    observers, _ = after_a_round()
    asked = [at for at in range(1, 60) if observers.choose([f"visitor{at}"], at)[1]]
    assert len(asked) == 59 // SCOUT_S + 1


def test_however_much_breaks_rounds_keep_apart() -> None:
    observers, _ = after_a_round(at=100.0)
    for at in (101.0, 102.0, 103.0):
        observers.hurry(at)
    assert observers.next_round_at() == 100.0 + HURRY_S
    observers.begin_round(105.0)
    assert observers.next_round_at() == 105.0 + ROUND_S


@pytest.mark.parametrize(
    ("observation", "expected"),
    [
        (seen("a", OLD, 4001), False),
        (seen("a", NEW, 4001), True),
        (seen("a", OLD), True),  # a port that was open is not any more
        (seen("a", "2abc::1"), False),  # of a family in which nobody has looked
    ],
)
def test_what_does_not_fit(observation: Observation, expected: bool) -> None:
    assert (
        contradicts(observation, Reachability("mapped", "unknown", (OLD,), (f"/ip4/{OLD}/tcp/4001",)))
        is expected
    )


def test_who_cannot_be_reached_expects_nobody_to_get_through() -> None:
    assert not contradicts(seen("a", OLD), Reachability("private", "symmetric", (OLD,)))
    assert contradicts(seen("a", NEW), Reachability("private", "symmetric", (OLD,)))
