"""What a client and the hops of its route agree on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.node.protocol.messages import Opened
from p2pinfer.session.flow_limits import FlowLimits, agree


def test_hops_that_allow_more_change_nothing() -> None:
    assert agree(256, 8, 1024, [Opened("float32"), Opened("float32")]) == FlowLimits(256, 8)


def test_the_strictest_hop_decides() -> None:
    hops = [Opened("float32", 100, 16), Opened("float32", 1024, 3)]
    assert agree(256, 8, 1024, hops) == FlowLimits(100, 3)


def test_bytes_bound_both_the_chunk_and_how_many_travel() -> None:
    assert agree(256, 8, 1000, [Opened("float32", max_bytes_in_flight=512_000)]) == FlowLimits(256, 2)
    assert agree(256, 8, 1000, [Opened("float32", max_bytes_in_flight=10_000)]) == FlowLimits(10, 1)


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
