"""A pipeline of lines and hops, chunk by chunk: the oracle of whatever reckons how long a prompt takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from p2pinfer.session.flow_limits import FIRST_WINDOW_BYTES, PassCost

TICK_S = 0.002


def in_chunks(tokens: int, length: int) -> list[int]:
    """A prompt in chunks of one length, the last of which has what is left."""
    return [min(length, tokens - at) for at in range(0, tokens, length)]


def passed_s(chunks: Sequence[int], row_s: float, costs: Sequence[PassCost]) -> float:
    """Seconds until the last chunk has passed all hops, and a line before each; each takes one at a time."""
    arrived = [0.0] * len(chunks)
    for cost in costs:
        for stage in (PassCost(0.0, row_s), cost):
            free = 0.0
            for index, tokens in enumerate(chunks):
                free = arrived[index] = max(arrived[index], free) + stage.seconds(tokens)
    return arrived[-1]


def passed_slow_lines_s(
    chunks: Sequence[int], row_bytes: int, bytes_per_s: float, rtt_s: float, costs: Sequence[PassCost]
) -> float:
    """The same where every line begins with TCP's first window, and doubles what it carries a round trip."""
    arrived = [0.0] * len(chunks)
    for cost in costs:
        sent = [0.0 for _ in range(round(rtt_s / TICK_S))]  # in the ticks of the last round trip, and before
        window, unacknowledged, index, left = float(FIRST_WINDOW_BYTES), 0.0, 0, chunks[0] * float(row_bytes)
        began_s, free = arrived[0], 0.0
        for tick in count():
            now_s = began_s + tick * TICK_S
            window += sent[tick]
            unacknowledged -= sent[tick]
            room = carried = min(bytes_per_s * TICK_S, window - unacknowledged)
            while room > 0 and index < len(chunks) and arrived[index] <= now_s:
                taken = min(room, left)
                left, room = left - taken, room - taken
                if left <= 0:
                    free = max(free, now_s + TICK_S + rtt_s / 2) + cost.seconds(chunks[index])
                    arrived[index], index = free, index + 1
                    left = chunks[index] * float(row_bytes) if index < len(chunks) else 0.0
            sent.append(carried - room)
            unacknowledged += carried - room
            if index == len(chunks):
                break
    return arrived[-1] + rtt_s / 2
