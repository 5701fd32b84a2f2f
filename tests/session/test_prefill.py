"""First chunk of a prompt on a line that nobody has measured."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pinfer.node.transport.line_rate import NO_LINE, Line
from p2pinfer.session.flow_limits import MOST_CHUNK_S
from p2pinfer.session.prefill import POLL_S, let_pass

RTT_S = 0.1


class Draining:
    """A line that carries so many bytes a second, and has 8,000 to carry."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.since = trio.current_time()

    def __call__(self) -> Line:
        passed_s = max(0.0, trio.current_time() - self.since - RTT_S)
        return Line(RTT_S, 0.0, max(0, round(8_000 - passed_s * self.bytes_per_s)), RTT_S)


@pytest.mark.parametrize(("bytes_per_s", "takes_s"), [(31_250, RTT_S + 0.128), (10e6, RTT_S)])
async def test_the_rest_waits_until_half_of_the_first_chunk_is_through(
    bytes_per_s: float, takes_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    line = Draining(bytes_per_s)
    await let_pass(line, 4_000)
    assert takes_s <= trio.current_time() - line.since <= takes_s + 2 * POLL_S


@pytest.mark.parametrize(
    "line", [NO_LINE, Line(RTT_S, 31_250, 8_000, RTT_S), Line(0.001, 0.0, 8_000, 0.001)], ids=str
)
async def test_nothing_waits_on_a_line_that_is_known_or_local(
    line: Line, autojump_clock: trio.testing.MockClock
) -> None:
    began_at = trio.current_time()
    await let_pass(lambda: line, 4_000)
    assert trio.current_time() == began_at


async def test_a_line_that_carries_nothing_does_not_hold_the_prompt_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    line = Draining(0.0)
    await let_pass(line, 4_000)
    assert trio.current_time() - line.since == pytest.approx(MOST_CHUNK_S)
