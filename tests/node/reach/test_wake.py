"""A process that slept notices when it wakes. Simulated clocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable

from p2pinfer.node.host.host import Host
from p2pinfer.node.reach.wake import BEAT_S, LATE_S, drop_silent, watch_for_sleep
from p2pinfer.node.transport.line_rate import Line
from p2pinfer.node.transport.yamux_stream import Carrier


class Clock:
    """Runs with trio's, and jumps when the lid is opened."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return trio.current_time() + self.ahead_s


async def test_a_lid_that_was_closed_is_noticed_within_a_beat(autojump_clock: trio.testing.MockClock) -> None:
    """trio's clock stands still meanwhile, as the kernel's monotonic one does on Linux."""
    clock, woken = Clock(), list[float]()

    async def wake(slept_s: float) -> None:
        woken.append(slept_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_for_sleep, wake, clock)
        await trio.sleep(10.5)
        assert not woken
        clock.ahead_s = 3600.0
        await trio.sleep(BEAT_S)
        assert woken == [pytest.approx(3600.0)]
        await trio.sleep(100)
        assert len(woken) == 1
        nursery.cancel_scope.cancel()


async def test_a_process_that_was_stopped_is_noticed_by_its_late_beat(
    mock_clock: trio.testing.MockClock,
) -> None:
    """Both clocks run on, and nobody was there to look."""
    woken, mock_clock.rate = list[float](), 0.0

    async def wake(slept_s: float) -> None:
        woken.append(slept_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_for_sleep, wake, Clock())
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(BEAT_S + 61)
        await trio.testing.wait_all_tasks_blocked()
        assert woken == [pytest.approx(61)]
        mock_clock.jump(BEAT_S + LATE_S / 2)  # a computer that is busy
        await trio.testing.wait_all_tasks_blocked()
        assert len(woken) == 1
        nursery.cancel_scope.cancel()


class Connection:
    """One connection, to a peer that answers after so long, never, or that is gone."""

    def __init__(self, answers_after_s: float | None, rtt_s: float = 0.0) -> None:
        self.muxed_conn = self
        self.peer_id = "peer"
        self.line = Line(rtt_s=rtt_s)
        self.closed = False
        self._answers_after_s = answers_after_s
        self.heard_at = 0.0

    async def is_answered(self, within_s: float) -> bool:
        return await Carrier.is_answered(cast(Any, self), within_s)

    async def ping(self) -> float:
        if self._answers_after_s is None:
            raise MuxedConnUnavailable("gone")
        await trio.sleep(self._answers_after_s)
        return self._answers_after_s

    async def close(self) -> None:
        self.closed = True


async def test_connections_that_answer_no_more_are_ended_all_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    living, dead, far, gone = Connection(0.1), Connection(1e9), Connection(5.0, rtt_s=1.6), Connection(None)
    connections = {
        "a": [living, dead],
        "b": [far],
        "c": [gone],
        **{f"d{n}": [Connection(1e9)] for n in range(9)},
    }
    network = SimpleNamespace(connections=connections)
    host = SimpleNamespace(libp2p=SimpleNamespace(get_network=lambda: network))
    began_at = trio.current_time()
    await drop_silent(cast(Host, cast(Any, host)), 3.0)
    assert trio.current_time() - began_at < 10
    assert [each.closed for each in (living, dead, far, gone)] == [False, True, False, True]
    assert all(each.closed for name, (each, *_) in connections.items() if name.startswith("d"))
