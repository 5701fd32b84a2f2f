"""What is measured of a line, and how much patience follows."""

from __future__ import annotations

import pytest

from p2pinfer.node.transport.line_rate import (
    MAX_QUEUE_S,
    MAX_RTT_S,
    ROUND_TRIPS,
    SAMPLE_BYTES,
    Line,
    LineRate,
)
from p2pinfer.node.transport.yamux_frames import (
    FIRST_FRAME_BYTES,
    MAX_PAYLOAD,
    MIN_FRAME_BYTES,
    frame_bytes,
)


class Clocked:
    """A sender that waits for each of its frames, one after the other."""

    def __init__(self) -> None:
        self.rate = LineRate()
        self.now = 0.0
        self.send(0, 0.001)  # the beginning of the first wait that counts

    def send(self, size: int, waited_s: float, freely: int = 0) -> None:
        """Send `size` bytes after waiting for so long, and then as many as found room meanwhile."""
        offered_at, self.now = self.now, self.now + waited_s
        self.rate.note(size, offered_at, self.now)
        self.rate.note(freely, self.now, self.now)


def test_a_rate_is_known_once_enough_bytes_have_waited_and_follows_the_line() -> None:
    sender = Clocked()
    sender.send(SAMPLE_BYTES - 1, 0.5)
    sender.send(1, 0.5)
    assert sender.rate.bytes_per_s == 0
    sender.send(SAMPLE_BYTES, 0.5)
    assert sender.rate.bytes_per_s == pytest.approx(SAMPLE_BYTES / 1.5)
    for _ in range(100):
        sender.send(SAMPLE_BYTES, 0.01)
    assert sender.rate.bytes_per_s == pytest.approx(SAMPLE_BYTES * 100, rel=0.05)


def test_a_burst_that_the_kernel_took_after_a_moment_is_no_rate() -> None:
    """31 KB/s: room for the first 16 KiB happened to come after 18 ms."""
    sender = Clocked()
    sender.send(SAMPLE_BYTES, 0.018)
    assert sender.rate.bytes_per_s == 0
    for _ in range(16):
        sender.send(SAMPLE_BYTES // 4, SAMPLE_BYTES / 4 / 31_250)
    assert sender.rate.bytes_per_s == pytest.approx(31_250, rel=0.5)


def test_what_finds_room_after_a_wait_counts_as_well() -> None:
    """The kernel asks for more when half of what it keeps is gone: one frame waits, and three do not."""
    sender = Clocked()
    for _ in range(20):
        sender.send(2_000, 8_000 / 31_250, freely=6_000)
    assert sender.rate.bytes_per_s == pytest.approx(31_250, rel=0.05)


def test_a_line_that_ran_dry_in_between_tells_no_rate() -> None:
    """A wait of half a second, then nothing to send for ten: that is no rate of 1.6 KB/s."""
    sender = Clocked()
    for _ in range(20):
        sender.send(16_000, 0.5)
        sender.now += 10.0
    assert sender.rate.bytes_per_s == 0


def test_bytes_that_never_waited_say_nothing() -> None:
    rate = LineRate()
    rate.note(10 * SAMPLE_BYTES, 1.0, 1.0)
    assert rate.bytes_per_s == 0


def test_patience_follows_round_trips_and_what_is_queued() -> None:
    assert Line().patience_s(1.5) == 1.5
    assert Line(rtt_s=1.6).patience_s(1.5) == pytest.approx(1.5 + ROUND_TRIPS * 1.6)
    assert Line(bytes_per_s=31_250, queued_bytes=62_500).patience_s(1.5) == pytest.approx(3.5)
    assert Line(queued_bytes=62_500).patience_s(1.5) == 1.5


def test_a_peer_that_answers_late_or_reads_slowly_gains_bounded_patience() -> None:
    most_s = 1.5 + ROUND_TRIPS * MAX_RTT_S + MAX_QUEUE_S
    assert Line(rtt_s=1e6, bytes_per_s=1e-3, queued_bytes=1 << 30).patience_s(1.5) == most_s


def test_a_frame_takes_a_tenth_of_a_second_of_the_line() -> None:
    assert frame_bytes(100_000, 0.05) == 10_000
    assert frame_bytes(1_000, 0.05) == MIN_FRAME_BYTES
    assert frame_bytes(1e9, 0.05) == MAX_PAYLOAD


def test_a_line_of_unknown_rate_has_short_frames_unless_it_is_local() -> None:
    assert frame_bytes(0, 0.05) == frame_bytes(0, 0) == FIRST_FRAME_BYTES
    assert frame_bytes(0, 0.001) == MAX_PAYLOAD


def test_a_busy_processor_makes_no_local_line_thin_and_a_thin_local_line_is_told() -> None:
    assert frame_bytes(500_000, 0.001) == MAX_PAYLOAD
    assert frame_bytes(50_000, 0.001) == 5_000


def test_a_near_line_is_near_also_while_processors_are_busy() -> None:
    assert Line(rtt_s=0.05, least_rtt_s=0.002).is_local
    assert not Line(rtt_s=0.05, least_rtt_s=0.02).is_local
    assert not Line(rtt_s=0.05, bytes_per_s=31_250, least_rtt_s=0.002).is_local  # thin
    assert not Line().is_local  # unknown
