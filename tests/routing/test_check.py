from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from p2pinfer.errors import PolicyError
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.score import Score
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.check import check_routes
from p2pinfer.routing.route import Candidate, Hop, Route, RouteRequest

REVISION = "a" * 32
REQUEST = RouteRequest(REVISION, 8, 64, tokens=100, excluded=frozenset({"excluded"}))


@dataclass
class View:
    def score(self, peer_id: str) -> Score:
        return Score(0.5, 0.5)

    def is_banned(self, peer_id: str) -> bool:
        return peer_id == "banned"


def candidate(peer_id: str, start: int = 0, stop: int = 8, free: int = 100) -> Candidate:
    return Candidate(Announcement(peer_id, "m", REVISION, BlockSpan(start, stop), "float32", 1.0, free, 1))


CANDIDATES = [
    candidate("whole"),
    candidate("first", 0, 4),
    candidate("second", 4, 8),
    candidate("banned"),
    candidate("excluded"),
    replace(
        candidate("strange"),
        announcement=replace(candidate("strange").announcement, dtype="bfloat16_float32"),
    ),
    candidate("full", free=0),
    replace(candidate("left"), announcement=replace(candidate("left").announcement, leaving=True)),
]


def route(*hops: tuple[str, int, int]) -> Route:
    return Route(tuple(Hop(peer_id, BlockSpan(start, stop)) for peer_id, start, stop in hops))


GOOD = route(("first", 0, 4), ("second", 4, 8))


def check(*routes: object, request: RouteRequest = REQUEST) -> None:
    check_routes(cast(list[Route], list(routes)), request, CANDIDATES, View())


def test_routes_that_can_be_walked_pass() -> None:
    check(GOOD, route(("whole", 0, 5), ("second", 5, 8)))
    check(route(("first", 2, 4), ("whole", 4, 5)), request=replace(REQUEST, span=BlockSpan(2, 5)))


def test_a_peer_that_announced_a_full_cache_may_be_asked_all_the_same() -> None:
    check(route(("full", 0, 8)))


def test_no_route_at_all_is_refused() -> None:
    with pytest.raises(PolicyError, match="no route"):
        check()


@pytest.mark.parametrize(
    ("nonsense", "complaint"),
    [
        (None, "None instead of a Route"),
        ("x" * 500, "instead of a Route"),
        (Route(()), "tuple of one Hop or more"),
        (Route(cast(Any, [Hop("whole", BlockSpan(0, 8))])), "tuple of one Hop or more"),
        (Route(cast(Any, ("whole",))), "'whole' is not a Hop"),
        (Route((Hop("whole", cast(Any, (0, 8))),)), "not a Hop"),
        (Route((Hop(cast(Any, ["whole"]), BlockSpan(0, 8)),)), "not a Hop"),
        (route(("first", 0, 3), ("second", 4, 8)), "a gap between 0:3 and 4:8"),
        (route(("first", 0, 4), ("whole", 3, 8)), "an overlap between 0:4 and 3:8"),
        (route(("first", 0, 4)), "covers 0:4 instead of 0:8"),
        (route(("second", 4, 8)), "covers 4:8 instead of 0:8"),
        (route(("whole", 0, 2), ("first", 2, 4), ("whole", 4, 8)), "twice"),
        (route(("nobody", 0, 8)), "nobody, which is not a candidate"),
        (route(("first", 0, 5), ("second", 5, 8)), "first, which serves only 0:4"),
        (route(("banned", 0, 8)), "banned, which is banned"),
        (route(("strange", 0, 8)), "strange, which computes in a format that cannot be audited here"),
        (route(("excluded", 0, 8)), "excluded, which the request excludes"),
        (route(("left", 0, 8)), "left, which is leaving"),
    ],
)
def test_nonsense_is_refused_and_said_to_be_what_it_is(nonsense: object, complaint: str) -> None:
    with pytest.raises(PolicyError, match=complaint) as caught:
        check(GOOD, nonsense)
    assert len(str(caught.value)) < 200


def test_a_floor_on_integrity_in_the_request_binds_policies_too() -> None:
    with pytest.raises(PolicyError, match="integrity"):
        check(GOOD, request=replace(REQUEST, min_integrity=0.6))
