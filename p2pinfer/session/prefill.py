"""A prompt on its way through the hops: chunks that follow each other without waiting."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import trio

from p2pinfer.node.transport.line_rate import Line

from .chain import Chain
from .flow_limits import MOST_CHUNK_S, ChunkSizes, pass_costs
from .pending import Pending
from .terms import Inputs

POLL_S: Final = 0.01  # no kernel tells when what it sent was acknowledged

logger = logging.getLogger(__name__)


class Submit(Protocol):
    """Sends inputs without waiting for what becomes of them: `Session.submit`."""

    async def __call__(
        self, inputs: Inputs, position: int, *, returns: int | None = None, kept: bool = False
    ) -> Pending: ...


async def send_in_chunks(inputs: Inputs, position: int, submit: Submit, chain: Chain, kept: int = 0) -> Any:
    """Push a prompt through, as many chunks at a time as the hops take.

    Args:
        inputs: For `position` and the positions behind it.
        kept: How many of them, the first ones, the hops have already; they do not travel.

    Returns:
        Output of the last position alone.

    Raises:
        PeerError: The session is over.
    """
    limits = chain.flow_limits
    row_bytes = chain.terms.sent_row_bytes(position + kept)
    to_send = len(inputs) - kept
    costs = pass_costs(hop.opened for hop in chain.hops)
    sizes = ChunkSizes(limits, row_bytes, chain.way_s, tokens=to_send, hops=len(chain.hops), costs=costs)
    # Of what is in flight, as it is in hops' memory: where it travels packed it counts as what it is there.
    most_tokens = max(limits.bytes_in_flight // chain.terms.row_bytes, limits.chunk_tokens)
    in_flight = deque[tuple[Pending, int]]()
    under_way = done = 0
    while done < len(inputs):
        while in_flight and (
            len(in_flight) >= limits.steps_in_flight or under_way > most_tokens - limits.chunk_tokens
        ):
            full_at = trio.current_time()
            oldest, tokens = in_flight.popleft()
            await oldest
            under_way -= tokens
            if done > kept:
                sizes.note_stall(trio.current_time() - full_at, chain.hops[0].line)
        line = chain.hops[0].line
        # Of what does not travel, the line says nothing.
        tokens = min(limits.chunk_tokens, kept - done) if done < kept else sizes.next_tokens(line)
        at = position + done
        _, end = next(chain.terms.pieces(at, at + tokens, tokens))
        chunk = inputs[done : done + end - at]
        logger.debug("prefill.chunk at=%d tokens=%d bytes_per_s=%.0f", done, len(chunk), line.bytes_per_s)
        is_last = done + len(chunk) == len(inputs)
        pending = await submit(chunk, position + done, returns=1 if is_last else 0, kept=done < kept)
        in_flight.append((pending, len(chunk)))
        under_way += len(chunk)
        is_first = done == kept
        done += len(chunk)
        if is_first and not is_last:
            await let_pass(lambda: chain.hops[0].line, len(chunk) * row_bytes // 2)
    # All of them, not only the last: an error is raised for the chunk that it concerns, and no result is left
    # behind that nobody waits for.
    while len(in_flight) > 1:
        await in_flight.popleft()[0]
    return await in_flight.pop()[0]


async def let_pass(line: Callable[[], Line], left: int) -> None:
    """Wait until a line of unknown rate has at most `left` bytes to carry, or its rate is known.

    TCP begins with ten segments at once. A router of 30 KB/s holds fewer and drops the rest, and the end of a
    short prompt waits for them to be sent again. On a fast line this takes one round trip, in which TCP would
    have carried little more.

    Args:
        line: Tells the line's state now.
    """
    with trio.move_on_after(MOST_CHUNK_S):
        while (now := line()).queued_bytes > left and not now.bytes_per_s and not now.is_local:
            await trio.sleep(POLL_S)
