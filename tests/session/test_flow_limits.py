"""What a client and the hops of its route agree on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.node.config import ServeConfig
from p2pinfer.node.protocol.messages import Opened
from p2pinfer.node.transport.line_rate import NO_LINE, Line
from p2pinfer.session.flow_limits import (
    AHEAD,
    CHUNK_S,
    FIRST_BYTES,
    FIRST_WINDOW_BYTES,
    LEAST_BYTES_PER_S,
    LEAST_PIECE_TOKENS,
    LEAST_TOKENS,
    MOST_CHUNK_S,
    PIECES,
    ChunkSizes,
    FlowLimits,
    PassCost,
    agree,
    pass_costs,
    pipeline_s,
    replay_limit_s,
)

from .pipelines import in_chunks, passed_s, passed_slow_lines_s


def test_hops_that_allow_more_change_nothing() -> None:
    assert agree(256, 8, 1024, [Opened("float32"), Opened("float32")]) == FlowLimits(256, 8, 8, 64 << 20)


def test_the_strictest_hop_decides() -> None:
    hops = [Opened("float32", 100, 16), Opened("float32", 1024, 3)]
    assert agree(256, 8, 1024, hops) == FlowLimits(100, 3, 3, 64 << 20)


def test_bytes_bound_both_the_chunk_and_how_many_travel() -> None:
    assert agree(256, 8, 1000, [Opened("float32", max_bytes_in_flight=512_000)]) == FlowLimits(
        256, 2, 8, 512_000
    )
    assert agree(256, 8, 1000, [Opened("float32", max_bytes_in_flight=10_000)]) == FlowLimits(
        10, 1, 8, 10_000
    )


@given(
    st.integers(1, 5000),
    st.integers(1, 64),
    st.integers(1, 1 << 20),
    st.lists(
        st.builds(
            Opened, st.just("float32"), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 1 << 30)
        ),
        min_size=1,
    ),
)
def test_no_limit_is_exceeded_but_by_a_single_token(
    tokens: int, in_flight: int, row_bytes: int, hops: list[Opened]
) -> None:
    agreed = agree(tokens, in_flight, row_bytes, hops)
    assert 1 <= agreed.chunk_tokens <= min(tokens, *(hop.max_chunk_tokens for hop in hops))
    assert 1 <= agreed.chunks_in_flight <= min(in_flight, *(hop.max_steps_in_flight for hop in hops))
    under_way = agreed.chunk_tokens * agreed.chunks_in_flight
    most = min(hop.max_bytes_in_flight for hop in hops)
    assert under_way * row_bytes <= most or under_way == 1


ROW = 1280  # bytes of one token


def limits(tokens: int, in_flight: int) -> FlowLimits:
    return FlowLimits(tokens, in_flight, in_flight, 64 << 20)


def test_a_chunk_is_as_long_as_a_thin_line_takes_for_a_quarter_of_a_second() -> None:
    sizes = ChunkSizes(limits(256, 8), ROW)
    assert sizes.next_tokens(Line(0.05, bytes_per_s=125_000)) == 24  # 1 Mbit/s
    assert sizes.next_tokens(Line(0.05, bytes_per_s=31_250)) == 6
    assert sizes.next_tokens(Line(0.05, bytes_per_s=1_000)) == LEAST_TOKENS
    assert ChunkSizes(limits(256, 8), ROW).next_tokens(Line(0.05, bytes_per_s=100e6)) == 256


def test_a_rate_that_rises_suddenly_is_believed_step_by_step() -> None:
    sizes, fast = ChunkSizes(limits(256, 8), ROW), Line(0.05, bytes_per_s=1e6)
    assert sizes.next_tokens(Line(0.05, bytes_per_s=125_000)) == 24
    assert [sizes.next_tokens(fast) for _ in range(4)] == [48, 96, 192, 195]
    assert sizes.next_tokens(Line(0.05, bytes_per_s=125_000)) == 24
    assert sizes.next_tokens(fast) == 195


def test_an_unknown_line_begins_with_a_short_chunk_unless_it_is_local() -> None:
    sizes = ChunkSizes(limits(256, 8), ROW)
    assert sizes.next_tokens(Line(rtt_s=0.05)) == FIRST_BYTES // ROW
    assert sizes.next_tokens(Line(rtt_s=0.001, least_rtt_s=0.001)) == sizes.next_tokens(NO_LINE) == 256


def test_chunks_grow_where_all_of_them_in_flight_leave_the_line_idle() -> None:
    sizes, line = ChunkSizes(limits(256, 8), ROW), Line(1.6, bytes_per_s=125_000)
    sizes.note_stall(0.2, replace(line, queued_bytes=12_500))  # it is busy
    sizes.note_stall(0.001, line)
    assert sizes.next_tokens(line) == 24
    sizes.note_stall(0.03, line)
    assert sizes.next_tokens(line) == 48
    sizes.note_stall(1.0, replace(line, queued_bytes=12_500))  # it must have been idle for most of that
    assert sizes.next_tokens(line) == 96
    for _ in range(10):
        sizes.note_stall(1.0, line)
    assert [sizes.next_tokens(line), sizes.next_tokens(line)] == [192, 256]


def test_chunks_of_a_line_that_takes_everything_grow() -> None:
    sizes, line = ChunkSizes(limits(256, 8), ROW), Line(rtt_s=0.1)
    taken = [sizes.next_tokens(line) for _ in range(30)]
    assert taken == sorted(taken)
    assert (taken[0], taken[-1]) == (FIRST_BYTES // ROW, 256)


@given(st.floats(1e4, 1e6), st.floats(0.0, 4.0), st.integers(1, 16))
def test_what_may_be_in_flight_lasts_until_the_first_result_is_back(
    rate: float, way_s: float, in_flight: int
) -> None:
    """On a line that has become `AHEAD` times as fast meanwhile, but for what a chunk may be at most."""
    most = 1 << 20
    tokens = ChunkSizes(limits(most, in_flight), ROW, way_s).next_tokens(Line(0.1, bytes_per_s=rate))
    lasts_s = in_flight * (tokens + 1) * ROW / (AHEAD * rate)
    assert lasts_s >= min(way_s, MOST_CHUNK_S * in_flight / AHEAD)


NEAR = 0.005  # seconds there and back: shorter than TCP needs to begin


def test_a_prompt_is_cut_into_pieces_for_every_hop_but_for_one_alone() -> None:
    fast = Line(NEAR, bytes_per_s=2.5e6)

    def first(tokens: int, hops: int, line: Line = fast) -> int:
        return ChunkSizes(limits(256, 24), ROW, tokens=tokens, hops=hops).next_tokens(line)

    assert first(1000, 1) == first(0, 4) == 256
    assert first(1000, 2) == 1000 // (2 * PIECES)
    assert first(1000, 4) == 1000 // (4 * PIECES)
    assert first(100, 4) == LEAST_PIECE_TOKENS
    assert first(1000, 4, Line(NEAR, bytes_per_s=31_250)) == 6  # a thin line needs shorter ones
    assert first(1000, 4, NO_LINE) == 256


def test_pieces_are_longer_where_so_many_short_ones_would_leave_the_line_idle() -> None:
    line = Line(NEAR, bytes_per_s=125_000)
    sizes = ChunkSizes(limits(256, 8), ROW, 2.4, tokens=200, hops=4)
    assert sizes.next_tokens(line) == int(2.4 * 125_000) // ROW


# ---------------------------------------------------------------------- what hops say of themselves

# Four blocks of 1024x16 in float32 with one thread, and its rows as they are and packed.
SLOW = PassCost(0.0195, 0.00094)
PLAIN_ROW, PACKED_ROW = 4096, 1064


def test_what_hops_take_is_known_if_all_of_them_say_it() -> None:
    told = Opened("float32", pass_us=19_500, token_ns=940_000)
    assert pass_costs([told, told]) == [pytest.approx(SLOW)] * 2
    assert pass_costs([told, Opened("float32")]) == []
    assert pass_costs([Opened("float32", pass_us=7)]) == [(7e-6, 0.0)]


@given(
    st.integers(1, 2000),
    st.integers(1, 300),
    st.floats(0, 1e-2),
    st.lists(st.builds(PassCost, st.floats(0, 0.1), st.floats(1e-9, 1e-2)), min_size=1, max_size=6),
)
def test_the_time_of_a_pipeline_is_what_passing_it_takes(
    tokens: int, chunks: int, row_s: float, costs: list[PassCost]
) -> None:
    length = -(-tokens // chunks)
    whole = length * -(-tokens // length)  # the last chunk counts as one of the others
    simulated_s = passed_s(in_chunks(whole, length), row_s, costs)
    assert pipeline_s(tokens, length, row_s, costs) == pytest.approx(simulated_s)


def of_best(tokens: int, rate: float, costs: list[PassCost]) -> float:
    """Seconds with chunks of the chosen length, over those with the best of all lengths that may be."""
    sizes = ChunkSizes(limits(256, 24), ROW, tokens=tokens, hops=len(costs), costs=costs)
    chosen = sizes.next_tokens(Line(0.0, bytes_per_s=rate))
    most = max(LEAST_TOKENS, min(256, tokens, int(rate * CHUNK_S) // ROW))
    seconds = {
        length: passed_s(in_chunks(tokens, length), ROW / rate, costs)
        for length in range(LEAST_TOKENS, most + 1)
    }
    return seconds[min(chosen, tokens)] / min(seconds.values())


@given(
    st.integers(16, 600),
    st.floats(1e4, 1e8),
    st.lists(st.builds(PassCost, st.floats(1e-4, 0.1), st.floats(1e-6, 1e-2)), min_size=1, max_size=5),
)
@settings(max_examples=25)
def test_no_other_length_is_much_sooner_through(tokens: int, rate: float, costs: list[PassCost]) -> None:
    """Nor does it matter much that the last of a few chunks may be shorter than the others."""
    assert of_best(tokens, rate, costs) <= 1.25


@pytest.mark.parametrize("rate", [1e5, 1e6, 2.5e6, 1e7, 1e8])
@pytest.mark.parametrize("hops", [1, 2, 4])
def test_no_other_length_is_sooner_through_for_many_chunks(rate: float, hops: int) -> None:
    assert of_best(1000, rate, [SLOW] * hops) <= 1.03


def lengths(
    row: int, line: Line, costs: list[PassCost], *, tokens: int = 1000, way_s: float = 0.125
) -> list[int]:
    """The chunks of a prompt over four hops, on a line that stays as it is."""
    sizes = ChunkSizes(limits(256, 24), row, way_s, tokens=tokens, hops=4, costs=costs)
    taken: list[int] = []
    while (left := tokens - sum(taken)) > 0:
        taken.append(min(sizes.next_tokens(line), left))
    return taken


FAR = Line(0.05, bytes_per_s=2.5e6)  # 20 Mbit/s, 25 ms one way


def test_chunks_are_longer_where_hops_are_slower_than_lines() -> None:
    assert max(lengths(PLAIN_ROW, FAR, [SLOW] * 4)) == 28  # 46 ms of each line and each hop
    assert max(lengths(PACKED_ROW, FAR, [SLOW] * 4)) == 67
    assert max(lengths(PACKED_ROW, FAR, [PassCost(1e-6, 1e-6)] * 4, way_s=0.0)) == LEAST_TOKENS


def test_chunks_begin_short_and_double_on_a_line_that_takes_round_trips_to_begin() -> None:
    assert lengths(PLAIN_ROW, FAR, [SLOW] * 4)[:5] == [4, 8, 16, 28, 28]
    assert lengths(PACKED_ROW, FAR, [SLOW] * 4)[:5] == [7, 14, 28, 56, 67]
    assert lengths(PLAIN_ROW, FAR, [])[:5] == [4, 8, 16, 32, 41]  # hops of an earlier version
    near = replace(FAR, rtt_s=FIRST_WINDOW_BYTES / FAR.bytes_per_s)
    assert set(lengths(PLAIN_ROW, near, [SLOW] * 4)[:-1]) == {28}


@pytest.mark.parametrize("row", [PLAIN_ROW, PACKED_ROW])
def test_no_chunks_of_one_length_are_sooner_through_lines_that_begin_slowly(row: int) -> None:
    def seconds(chunks: list[int]) -> float:
        return passed_slow_lines_s(chunks, row, FAR.bytes_per_s, FAR.rtt_s, [SLOW] * 4)

    chosen_s = seconds(lengths(row, FAR, [SLOW] * 4))
    assert all(chosen_s < 0.93 * seconds(in_chunks(1000, length)) for length in (16, 28, 41, 64, 96))


def test_short_chunks_last_as_long_as_a_result_takes_to_come_back() -> None:
    """On a line that may become faster meanwhile, unless the slowest hop is at work until then."""
    quick = [PassCost(0.002, 0.0001)] * 4
    assert max(lengths(PLAIN_ROW, FAR, quick, way_s=0.001)) == LEAST_TOKENS
    length = max(lengths(PLAIN_ROW, FAR, quick))
    assert length * PLAIN_ROW / FAR.bytes_per_s >= AHEAD * 0.125 / 24
    assert lengths(PLAIN_ROW, FAR, quick, tokens=100, way_s=50.0)[-1] <= 100


def test_a_chunk_is_never_more_than_was_agreed_nor_nothing() -> None:
    line = Line(0.05, bytes_per_s=1)
    assert ChunkSizes(limits(2, 1), ROW).next_tokens(line) == 2
    assert ChunkSizes(limits(256, 8), 1 << 24).next_tokens(Line(0.05)) == LEAST_TOKENS


def test_a_replay_over_any_line_that_a_hop_bears_has_its_time() -> None:
    assert ServeConfig().min_bytes_per_s >= 2 * LEAST_BYTES_PER_S
    positions, row_bytes = 1000, 1280
    slowest_s = positions * row_bytes / ServeConfig().min_bytes_per_s
    # Through three hops one after the other, nothing at the same time.
    assert replay_limit_s(positions, row_bytes, 3, 60.0) > 3 * slowest_s
    assert replay_limit_s(0, row_bytes, 3, 60.0) == 60.0
