from dataclasses import dataclass, replace

import pytest

from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.score import Score
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.eligibility import Ineligibility, eligible, no_route, refusal
from p2pinfer.routing.route import Candidate, RouteRequest

REVISION = "a" * 32
REQUEST = RouteRequest(
    REVISION,
    num_blocks=8,
    hidden_bytes_per_token=64,
    tokens=100,
    excluded=frozenset({"excluded"}),
    min_integrity=0.6,
)


@dataclass
class View:
    def score(self, peer_id: str) -> Score:
        return Score(integrity=0.5 if peer_id == "stranger" else 0.9, reliability=0.9)

    def is_banned(self, peer_id: str) -> bool:
        return peer_id == "banned"


def candidate(
    peer_id: str, start: int = 0, stop: int = 8, free: int = 100, dtype: str = "float32"
) -> Candidate:
    return Candidate(Announcement(peer_id, "m", REVISION, BlockSpan(start, stop), dtype, 1.0, free, 1))


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        (candidate("peer"), None),
        (candidate("peer", free=99), Ineligibility.FULL),
        (candidate("excluded"), Ineligibility.EXCLUDED),
        (candidate("stranger"), Ineligibility.UNTRUSTED),
        (candidate("banned"), Ineligibility.BANNED),
        (candidate("peer", stop=9), Ineligibility.ABSENT),
        (candidate("peer", dtype="bfloat16"), None),
        (candidate("peer", dtype="float16"), None),
        (candidate("peer", dtype="bfloat16_float32"), Ineligibility.UNCHECKABLE),
        (candidate("peer", dtype="bfloat16_float32"), Ineligibility.UNCHECKABLE),
        (candidate("peer", dtype="what_is_this"), Ineligibility.UNCHECKABLE),
        (candidate("peer", dtype="bfloat16_float32", free=99), Ineligibility.UNCHECKABLE),
        (candidate("peer", stop=9, dtype="bfloat16_float32"), Ineligibility.ABSENT),
    ],
)
def test_a_candidate_is_refused_for_a_reason(peer: Candidate, reason: Ineligibility | None) -> None:
    assert refusal(peer, REQUEST, View()) is reason


def test_peers_of_another_revision_and_peers_that_leave_are_not_there() -> None:
    announcement = candidate("peer").announcement
    other = Candidate(replace(announcement, revision="b" * 32))
    leaving = Candidate(replace(announcement, leaving=True))
    assert refusal(other, REQUEST, View()) is refusal(leaving, REQUEST, View()) is Ineligibility.ABSENT


def test_without_a_view_nobody_is_banned_or_distrusted() -> None:
    assert refusal(candidate("banned"), REQUEST, None) is None
    assert refusal(candidate("stranger"), REQUEST, None) is None


def test_the_eligible_come_in_order_and_once() -> None:
    peers = [candidate("b"), candidate("a"), candidate("b"), candidate("banned")]
    assert [peer.peer_id for peer in eligible(peers, REQUEST, View())] == ["a", "b"]


def test_the_error_tells_unserved_blocks_from_served_ones_that_cannot_be_used() -> None:
    peers = [
        candidate("fine", 0, 1),
        candidate("full", 1, 2, free=0),
        candidate("excluded", 2, 3),
        candidate("stranger", 3, 4),
        candidate("banned", 4, 5),
        candidate("full2", 6, 7, free=0),
    ]
    error = no_route(peers, REQUEST, View())
    assert error.missing == ((5, 6), (7, 8))
    assert str(error) == (
        "no route: nobody serves blocks 5:6, 7:8; `p2pinfer node --blocks 5:6` would; "
        "blocks 4:5 are served only by banned peers; `p2pinfer reputation` says why; "
        "blocks 3:4 are served only by peers whose integrity is below 0.60; the default policy tries and "
        "audits them, `p2pinfer reputation vouch` takes your word for it; "
        "blocks 2:3 are served only by peers that failed this request or already work for it; "
        "blocks 1:2, 6:7 are served only by peers without cache for 100 tokens; try again soon "
        "(the most that any of them has free is 0)"
    )


def test_the_command_that_would_help_is_that_of_the_model_and_the_swarm() -> None:
    command = "p2pinfer node --model org/model --bootstrap /ip4/127.0.0.1/tcp/1"
    error = no_route([], replace(REQUEST, serve_command=command), View())
    assert f"nobody serves blocks 0:8; `{command} --blocks 0:8` would" in str(error)


def test_a_block_that_is_full_at_one_peer_and_banned_at_another_is_called_full() -> None:
    error = no_route([candidate("full", free=0), candidate("banned")], REQUEST, View())
    assert error.missing == ()
    assert "without cache" in str(error) and "banned" not in str(error)


def test_an_empty_swarm_lacks_every_block_wanted() -> None:
    assert no_route([], REQUEST, None).missing == ((0, 8),)
    assert no_route([], replace(REQUEST, span=BlockSpan(2, 4)), None).missing == ((2, 4),)


def test_blocks_that_nobody_serves_in_known_numerics_are_told_with_a_few_of_those_there_are() -> None:
    peers = [
        candidate("a", 0, 8, dtype="bfloat16_float16"),
        candidate("b", 0, 8, dtype="bfloat16_float32"),
        candidate("c", 0, 8, dtype="what_is_this"),
        candidate("d", 0, 8, dtype="zzz"),
        candidate("e", 0, 4),
    ]
    error = no_route(peers, REQUEST, View())
    assert error.missing == ()
    assert not error.is_full
    assert str(error) == (
        "no route: blocks 4:8 are served only by peers that compute in bfloat16_float16, bfloat16_float32, "
        "what_is_this, which this version of p2pinfer cannot check; update it, or serve them yourself with "
        "`p2pinfer node --blocks 4:8`"
    )
