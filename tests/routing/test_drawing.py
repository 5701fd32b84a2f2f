import random
from collections import Counter

import pytest

from p2pinfer.errors import NoRoute
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.drawing import draw_routes
from p2pinfer.routing.route import Candidate, RouteRequest

REVISION = "a" * 32
REQUEST = RouteRequest(REVISION, num_blocks=8, hidden_bytes_per_token=64, tokens=100)


def candidate(peer_id: str, start: int, stop: int) -> Candidate:
    return Candidate(Announcement(peer_id, "m", REVISION, BlockSpan(start, stop), "float32", 1.0, 100, 1))


def alike(peer: Candidate, blocks: int) -> float:
    return 1.0


def test_peers_are_drawn_by_their_weight_and_told_what_they_take_off_the_way() -> None:
    asked: set[tuple[str, int]] = set()

    def weigh(peer: Candidate, blocks: int) -> float:
        asked.add((peer.peer_id, blocks))
        return {"seldom": 1.0, "often": 3.0}.get(peer.peer_id, 1.0)

    peers = [candidate("seldom", 0, 5), candidate("often", 0, 5), candidate("rest", 3, 8)]
    rng = random.Random(1)
    drawn = Counter(draw_routes(peers, REQUEST, Ledger(), weigh, rng)[0].peer_ids for _ in range(2000))
    assert set(drawn) == {("seldom", "rest"), ("often", "rest")}
    assert 0.70 < drawn["often", "rest"] / 2000 < 0.80
    assert asked == {("seldom", 5), ("often", 5), ("rest", 3)}


def test_a_route_that_is_drawn_twice_is_given_once() -> None:
    peers = [candidate("only", 0, 8)]
    assert len(draw_routes(peers, REQUEST, Ledger(), alike, random.Random(1), 3)) == 1


def test_the_banned_are_not_drawn_and_what_they_alone_serve_is_no_route() -> None:
    peers = [candidate("good", 0, 4), candidate("bad", 0, 8)]
    with pytest.raises(NoRoute, match="blocks 4:8 are served only by banned peers"):
        draw_routes(peers, REQUEST, Ledger(banned=["bad"]), alike, random.Random(1))
