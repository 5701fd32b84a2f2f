import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.models.span import BlockSpan, uncovered
from p2pinfer.routing.announcement import Announcement
from p2pinfer.routing.config import PlacementConfig
from p2pinfer.routing.placement import choose_span, should_move

REVISION = "a" * 32
LONG_S = 1e6

capacities = st.lists(st.integers(1, 12), min_size=1, max_size=25)


def announcement(peer_id: str, span: BlockSpan, tokens_per_s: float = 10.0) -> Announcement:
    return Announcement(peer_id, "m", REVISION, span, "float32", tokens_per_s, 100, 1)


def serving(*spans: tuple[int, int]) -> list[Announcement]:
    return [announcement(f"p{i}", BlockSpan(*span)) for i, span in enumerate(spans)]


def join_one_by_one(num_blocks: int, nodes: Sequence[tuple[int, float]]) -> list[Announcement]:
    """Nodes of (blocks they can hold, tokens per second through one block) join an empty swarm."""
    swarm: list[Announcement] = []
    for i, (capacity, speed) in enumerate(nodes):
        span = choose_span(swarm, num_blocks, capacity, speed)
        swarm.append(announcement(f"p{i}", span, speed / len(span)))
    return swarm


def move_until_quiet(
    swarm: list[Announcement], num_blocks: int, config: PlacementConfig | None = None
) -> int:
    """Let the nodes look in turns; the number of moves until nobody wants to move."""
    moves = 0
    quiet = False
    while not quiet:
        quiet = True
        for i, own in enumerate(swarm):
            target = should_move(own, swarm[:i] + swarm[i + 1 :], num_blocks, LONG_S, config)
            if target is not None:
                assert target != own.span
                swarm[i] = replace(own, span=target)
                moves += 1
                quiet = False
        assert moves <= 20 * len(swarm), "the nodes keep moving"
    return moves


def rates(swarm: Sequence[Announcement], num_blocks: int) -> list[float]:
    return [
        sum(peer.tokens_per_s for peer in swarm if peer.span.start <= block < peer.span.stop)
        for block in range(num_blocks)
    ]


def test_the_first_node_starts_at_the_first_block() -> None:
    assert choose_span([], 8, 3, 10.0) == BlockSpan(0, 3)


def test_a_node_with_room_for_all_takes_all() -> None:
    assert choose_span(serving((0, 2)), 8, 100, 10.0) == BlockSpan(0, 8)


def test_blocks_that_nobody_serves_come_first() -> None:
    assert choose_span(serving((0, 4), (6, 8)), 8, 2, 10.0) == BlockSpan(4, 6)
    assert choose_span(serving((0, 4), (7, 8)), 8, 2, 10.0) == BlockSpan(4, 6)


def test_the_slowest_blocks_come_next() -> None:
    fast, slow = announcement("a", BlockSpan(0, 4), 50.0), announcement("b", BlockSpan(4, 8), 5.0)
    assert choose_span([fast, slow], 8, 4, 10.0) == BlockSpan(4, 8)


def test_peers_that_leave_or_hold_more_blocks_than_there_are_do_not_count() -> None:
    leaving = replace(announcement("a", BlockSpan(0, 4)), leaving=True)
    nonsense = announcement("b", BlockSpan(0, 99))
    assert choose_span([leaving, nonsense], 8, 4, 10.0) == BlockSpan(0, 4)


def test_a_node_that_can_hold_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="0 blocks"):
        choose_span([], 8, 0, 10.0)


@given(st.integers(1, 40), capacities)
def test_with_enough_capacity_every_block_is_served(num_blocks: int, sizes: list[int]) -> None:
    swarm = join_one_by_one(num_blocks, [(size, 10.0) for size in sizes])
    missing = sum(map(len, uncovered([peer.span for peer in swarm], num_blocks)))
    assert missing == max(0, num_blocks - sum(sizes))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(4, 24), st.lists(st.tuples(st.integers(1, 12), st.floats(1, 500)), min_size=1, max_size=15)
)
def test_no_swarm_moves_for_ever_and_no_move_makes_it_worse(
    num_blocks: int, nodes: list[tuple[int, float]]
) -> None:
    rng = random.Random(0)
    swarm = join_one_by_one(num_blocks, nodes)
    for i, own in enumerate(swarm):  # scattered, as if by hand
        start = rng.randint(0, num_blocks - len(own.span))
        swarm[i] = replace(own, span=BlockSpan(start, start + len(own.span)))
    before = rates(swarm, num_blocks)
    move_until_quiet(swarm, num_blocks)
    after = rates(swarm, num_blocks)
    assert (-after.count(0), min(after)) >= (-before.count(0), min(before))


def test_nodes_that_join_one_after_another_end_balanced_and_at_rest() -> None:
    rng = random.Random(4)
    nodes = [(rng.randint(4, 12), rng.uniform(50, 400)) for _ in range(60)]
    swarm = join_one_by_one(32, nodes)
    moves = move_until_quiet(swarm, 32)
    fair = sum(speed for _, speed in nodes) / 32
    assert moves <= 3
    assert min(rates(swarm, 32)) > 0.75 * fair


def test_a_swarm_that_lost_half_its_nodes_repairs_itself() -> None:
    swarm = join_one_by_one(32, [(8, 100.0)] * 12)
    swarm = [peer for peer in swarm if peer.span.start not in (8, 16)]
    assert uncovered([peer.span for peer in swarm], 32)
    move_until_quiet(swarm, 32)
    assert not uncovered([peer.span for peer in swarm], 32)


def test_a_node_moves_to_a_gap_that_its_own_blocks_can_spare_it_for() -> None:
    own, *others = serving((0, 4), (0, 4))
    assert should_move(own, others, 8, LONG_S) == BlockSpan(4, 8)


def test_a_node_stays_where_leaving_tears_a_gap_as_large() -> None:
    (own,) = serving((0, 4))
    assert should_move(own, [], 8, LONG_S) is None


def test_a_node_that_has_just_settled_stays() -> None:
    own, *others = serving((0, 4), (0, 4))
    assert should_move(own, others, 8, 599.0, PlacementConfig(min_dwell_s=600.0)) is None
    assert should_move(own, others, 8, 600.0, PlacementConfig(min_dwell_s=600.0)) is not None


def test_a_small_gain_is_not_worth_a_move() -> None:
    own = announcement("own", BlockSpan(0, 4), 2.0)
    others = [announcement("a", BlockSpan(0, 4), 10.5), announcement("b", BlockSpan(4, 8), 10.0)]
    assert should_move(own, others, 8, LONG_S, PlacementConfig(min_gain=0.25)) is None
    assert should_move(own, others, 8, LONG_S, PlacementConfig(min_gain=0.01)) == BlockSpan(4, 8)


def test_a_node_does_not_move_from_one_gap_it_fills_to_another() -> None:
    own, other = serving((4, 6), (2, 4))
    assert should_move(own, [other], 6, LONG_S) is None


def test_a_restarted_node_goes_back_to_where_it_was() -> None:
    others = serving((0, 4), (4, 8))
    assert choose_span(others, 8, 4, 10.0) == BlockSpan(0, 4)
    for last in (BlockSpan(2, 6), BlockSpan(4, 8), BlockSpan(5, 8)):
        assert choose_span(others, 8, 4, 10.0, last) == last


def test_a_restarted_node_goes_where_it_is_needed_more() -> None:
    last = BlockSpan(0, 4)
    assert choose_span(serving((0, 4)), 8, 4, 10.0, last) == BlockSpan(4, 8)
    weak = [announcement("a", BlockSpan(0, 4), 50.0), announcement("b", BlockSpan(4, 8), 10.0)]
    assert choose_span(weak, 8, 4, 40.0, last) == BlockSpan(4, 8)
    assert choose_span(weak, 8, 4, 40.0, last, PlacementConfig(min_gain=2.0)) == last


@pytest.mark.parametrize("last", [BlockSpan(0, 2), BlockSpan(0, 5), BlockSpan(6, 9)])
def test_what_no_longer_fits_is_not_gone_back_to(last: BlockSpan) -> None:
    """Too few blocks for the room there is, too many for it, or blocks that the model does not have."""
    assert choose_span(serving((0, 4)), 8, 4, 10.0, last) == BlockSpan(4, 8)
