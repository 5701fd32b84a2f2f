"""Rate of the line from here, as sessions have found it.

A line's rate is known once somebody had to wait for it, so of the first prompt of a process nothing is known.
"""

from __future__ import annotations

from typing import Final

from p2pinfer.node.transport.line_rate import Line

SLOW_S: Final = 2.0  # a prompt that takes longer on the line is slow


class Uplink:
    """Rate of the line to the first hop in sessions that are over.

    Attributes:
        bytes_per_s: In the last one in which that could be told; 0: not known.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0.0

    def note(self, line: Line) -> None:
        """Note the line of a session that is over."""
        if line.bytes_per_s and not line.is_local:
            self.bytes_per_s = line.bytes_per_s

    def is_slow_for(self, size: int) -> bool:
        """True if so many bytes are known to take long."""
        return self.bytes_per_s > 0 and size > SLOW_S * self.bytes_per_s
