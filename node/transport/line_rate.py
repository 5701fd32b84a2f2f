"""Measured state of the line to a peer: round trip, rate, and bytes that wait to be sent.

A home line may carry 30 KB/s or 100 MB/s up. What is fast enough on the one takes ten seconds on the other,
so limits and sizes follow what was measured. The rate is what the line took while a sender had to wait for
it: as long as nobody waits, the line is faster than its users, and nothing is known.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Final, Protocol

import trio

SAMPLE_BYTES: Final = 16 << 10  # a rate is taken from no fewer
SAMPLE_S: Final = 0.1  # nor from shorter times: the kernel may have taken a burst just then
PAUSE_S: Final = 0.1  # in which nothing is offered, and a line does not run dry yet
ROUND_TRIPS: Final = 4  # for an answer, where packets are lost and sent again
MAX_RTT_S: Final = 8.0  # peers that answer later gain no more patience
MAX_QUEUE_S: Final = 8.0
NEAR_S: Final = 0.01  # round trips below this are of a local network
THIN_BYTES_PER_S: Final = 128 << 10  # a line below this queues and drops what it cannot carry
THIN_LASTS_S: Final = 60.0  # how long one measurement counts
CROWDED_S: Final = 2.0  # how long a wait for it counts


def is_local(bytes_per_s: float, rtt_s: float) -> bool:
    """True for a near line that was not found thin: waits there are for processors, and tell no rate.

    Args:
        rtt_s: The shortest round trip: others hold the time that a busy processor took to answer.
    """
    return 0 < rtt_s < NEAR_S and not is_thin(bytes_per_s)


def is_thin(bytes_per_s: float) -> bool:
    """True for a line that was measured, and queues and drops what it cannot carry."""
    return 0 < bytes_per_s < THIN_BYTES_PER_S


class LineRate:
    """Rate at which a line takes bytes.

    A sender that waits until there is room finds room for several frames, then waits again. From the end of
    one wait to that of the next, the line has carried what was handed over in between.

    Attributes:
        bytes_per_s: The estimate; 0 until `SAMPLE_BYTES` went, in `SAMPLE_S` at least, between such waits.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self._full_at = -math.inf  # when a wait last ended
        self._since = 0  # bytes handed over since, the first of which waited
        self._bytes = 0
        self._seconds = 0.0

    def note(self, sent: int, offered_at: float, taken_at: float) -> None:
        """Note `sent` bytes that were offered and taken then; at the same time if they did not wait."""
        if taken_at > offered_at:
            if offered_at - self._full_at < PAUSE_S:  # else it may have run dry
                self._bytes += self._since
                self._seconds += taken_at - self._full_at
            self._full_at, self._since = taken_at, 0
        self._since += sent
        if self._bytes < SAMPLE_BYTES or self._seconds < SAMPLE_S:
            return
        sample = self._bytes / self._seconds
        self.bytes_per_s = (self.bytes_per_s + sample) / 2 if self.bytes_per_s else sample
        self._bytes, self._seconds = 0, 0.0


@dataclass(frozen=True, slots=True)
class Line:
    """State of a line to a peer at one moment.

    Attributes:
        rtt_s: Round trip, seconds; 0 if it was not measured.
        bytes_per_s: Rate at which it takes our bytes; 0 if nobody has had to wait for it.
        queued_bytes: Bytes that were handed over and that the peer has not acknowledged.
        least_rtt_s: The shortest round trip, seconds; 0 if none was measured.
    """

    rtt_s: float = 0.0
    bytes_per_s: float = 0.0
    queued_bytes: int = 0
    least_rtt_s: float = 0.0

    @property
    def is_local(self) -> bool:
        """True for a near line that was not found thin."""
        return is_local(self.bytes_per_s, self.least_rtt_s)

    @property
    def queue_s(self) -> float:
        """Seconds until what is queued has gone out, as far as that can be told."""
        return min(self.queued_bytes / self.bytes_per_s, MAX_QUEUE_S) if self.bytes_per_s else 0.0

    def patience_s(self, base_s: float) -> float:
        """Seconds that an answer may take which takes `base_s` where the line takes no time.

        Bounded, whatever a peer makes of its round trips.
        """
        return base_s + ROUND_TRIPS * min(self.rtt_s, MAX_RTT_S) + self.queue_s

    def seconds_for(self, size: int) -> float:
        """Seconds that so many bytes take; 0 if nothing is known."""
        return size / self.bytes_per_s if self.bytes_per_s else 0.0


NO_LINE: Final = Line()  # of streams that run over no network


class _Patient(Protocol):
    """A connection whose limits follow its round trip, and the uplink."""

    rtt_s: float

    def expect_round_trip(self, rtt_s: float, latest_s: float = 0.0) -> None: ...


class Uplink:
    """The line that all connections of a host share, as far as they find it thin.

    A prompt that fills a line of 30 KB/s makes the router drop packets of every connection, and 3 s without
    an acknowledgement say nothing there. Whichever connection measures that gives all of them more time.
    """

    def __init__(self) -> None:
        self._thin_until = self._crowded_until = -math.inf
        self._crowding = trio.lowlevel.ParkingLot()
        self._streams = weakref.WeakSet[_Patient]()

    @property
    def is_thin(self) -> bool:
        """True if a connection has met a low rate of late."""
        return trio.current_time() < self._thin_until

    async def until_crowded(self) -> None:
        """Wait until it is thin and somebody waits for it, so that acknowledgements of ours get lost."""
        while trio.current_time() >= self._crowded_until:
            await self._crowding.park()

    def add(self, stream: _Patient) -> None:
        """Let a connection know when the line turns out to be thin."""
        self._streams.add(stream)

    def note(self, bytes_per_s: float) -> None:
        """Note the rate that a connection has measured, which had to wait just now."""
        if is_thin(bytes_per_s):
            was_thin, now = self.is_thin, trio.current_time()
            self._thin_until, self._crowded_until = now + THIN_LASTS_S, now + CROWDED_S
            self._crowding.unpark_all()
            if not was_thin:
                for stream in list(self._streams):
                    stream.expect_round_trip(stream.rtt_s)
