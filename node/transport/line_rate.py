"""Measured state of the line to a peer: round trip, rate, and bytes that wait to be sent.

A home line may carry 30 KB/s or 100 MB/s up. What is fast enough on the one takes ten seconds on the other,
so limits and sizes follow what was measured. The rate is what the line took while a sender had to wait for
it: as long as nobody waits, the line is faster than its users, and nothing is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SAMPLE_BYTES: Final = 16 << 10  # a rate is taken from no fewer
SAMPLE_S: Final = 0.1  # nor from shorter waits: the kernel may have taken a burst just then
ROUND_TRIPS: Final = 4  # for an answer, where packets are lost and sent again
MAX_RTT_S: Final = 8.0  # peers that answer later gain no more patience
MAX_QUEUE_S: Final = 8.0
NEAR_S: Final = 0.01  # round trips below this are of a local network
THIN_BYTES_PER_S: Final = 128 << 10  # a line below this queues and drops what it cannot carry


def is_local(bytes_per_s: float, rtt_s: float) -> bool:
    """True for a near line that was not found thin: waits there are for processors, and tell no rate.

    Args:
        rtt_s: The shortest round trip: others hold the time that a busy processor took to answer.
    """
    return 0 < rtt_s < NEAR_S and not 0 < bytes_per_s < THIN_BYTES_PER_S


class LineRate:
    """Rate at which a line takes bytes.

    Attributes:
        bytes_per_s: The estimate; 0 until senders have waited for `SAMPLE_BYTES`, and for `SAMPLE_S` in all.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self._bytes = 0
        self._waited_s = 0.0

    def note(self, sent: int, waited_s: float) -> None:
        """Note `sent` bytes that a sender could hand over after waiting for so long."""
        self._bytes += sent
        self._waited_s += waited_s
        if self._bytes < SAMPLE_BYTES or self._waited_s < SAMPLE_S:
            return
        sample = self._bytes / self._waited_s
        self.bytes_per_s = (self.bytes_per_s + sample) / 2 if self.bytes_per_s else sample
        self._bytes, self._waited_s = 0, 0.0


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
