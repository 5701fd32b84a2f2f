"""Negotiated flow limits: chunk size and steps in flight, within what every hop accepts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from p2pinfer.node.protocol.messages import Opened
from p2pinfer.node.transport.line_rate import NO_LINE, Line

CHUNK_S: Final = 0.25  # of the line to the first hop, for one chunk
MOST_CHUNK_S: Final = 4.0  # where round trips are so long that shorter chunks would leave the line idle
FIRST_BYTES: Final = 32 << 10  # of a chunk on a line of unknown rate
LEAST_TOKENS: Final = 4  # fewer cost more in computation than they save


@dataclass(frozen=True, slots=True)
class FlowLimits:
    """Chunks of a prompt, and how many of them may be under way."""

    chunk_tokens: int
    chunks_in_flight: int


def agree(chunk_tokens: int, chunks_in_flight: int, row_bytes: int, hops: Iterable[Opened]) -> FlowLimits:
    """The most that neither the client's own wishes nor any hop's limits forbid; at least a token at a time.

    Args:
        row_bytes: Of one token's hidden state as it travels.
    """
    limits = list(hops)
    most_bytes = min(hop.max_bytes_in_flight for hop in limits)
    tokens = min(chunk_tokens, most_bytes // row_bytes, *(hop.max_chunk_tokens for hop in limits))
    tokens = max(tokens, 1)
    in_flight = min(
        chunks_in_flight, most_bytes // (tokens * row_bytes), *(hop.max_steps_in_flight for hop in limits)
    )
    return FlowLimits(tokens, max(in_flight, 1))


class ChunkSizes:
    """Sizes of a prompt's chunks, as long as the line to the first hop takes for `CHUNK_S`.

    A hop computes a chunk when it has all of it. On a line of 1 Mbit/s, 256 tokens of 1,280 bytes take 2.6 s,
    in which the next hop would have nothing to do, and its own line would be idle.
    """

    def __init__(self, agreed: FlowLimits, row_bytes: int) -> None:
        """`row_bytes` is the size of one token's hidden state as it travels."""
        self._most = agreed.chunk_tokens
        self._row_bytes = row_bytes
        self._chunk_s = CHUNK_S

    def next_tokens(self, line: Line) -> int:
        """Tokens of the next chunk."""
        if line.is_local or line == NO_LINE:
            tokens = self._most
        elif line.bytes_per_s:
            tokens = int(line.bytes_per_s * self._chunk_s) // self._row_bytes
        else:
            tokens = FIRST_BYTES // self._row_bytes
        return max(1, min(max(tokens, LEAST_TOKENS), self._most))

    def note_stall(self, waited_s: float, line: Line) -> None:
        """Note that the line had run dry when all chunks that may be in flight were, and take longer ones."""
        if waited_s > line.queue_s + CHUNK_S:
            self._chunk_s = min(2 * self._chunk_s, MOST_CHUNK_S)
