"""Negotiated flow limits: chunk size and steps in flight, within what every hop accepts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2pinfer.node.protocol.messages import Opened


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
