"""Source of evidence: a peer that is asked for receipts and tensors, and the time that it has left for them.

How long a peer may take is part of the protocol (docs/wire.md, Evidence): a hop that is late is so by
everybody's reckoning. The time is its own: it does not run while this side pauses. And where this side's line
was busy with evidence of other peers, or seems to be down, nobody was late.

Much evidence is asked for piece by piece, from the session's beginning on. So a peer on a slow line, which is
in time, does not outlast an audit: what has come until then is audited.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import PeerError, PeerVanished
from p2pinfer.node.evidence.store import (
    ANSWER_S,
    ASKS_AT_ONCE,
    ASKS_PER_S,
    LEAST_BYTES_PER_S,
    MAX_DIGESTS,
    fetch_evidence,
)
from p2pinfer.node.host.network import Network
from p2pinfer.reputation.receipt import MAX_RECEIPT_BYTES
from p2pinfer.routing.route import Hop

logger = logging.getLogger(__name__)

DIAL_S: Final = 10.0  # more for a peer that has to be dialled first
RETRY_S: Final = (0.3, 1.0)  # pauses before it is asked again
ASK_S: Final = 0.5  # more for every request: a round trip over a relay
PIECE_BYTES: Final = 1 << 20  # asked for at once: 16 s of the slowest line that is in time


class NotTheirs(Exception):
    """Evidence that could not be had, for a reason that may lie with this side."""


@dataclass(slots=True)
class Line:
    """Evidence that has arrived over this side's line, for all audits together, in bytes."""

    arrived: int = 0

    def note(self, received: int) -> None:
        """Count bytes that came."""
        self.arrived += received


class EvidenceSource:
    """One peer that an audit asks for evidence."""

    def __init__(self, host: Network, hop: Hop, line: Line) -> None:
        self.hop = hop
        self._host = host
        self.line = line
        self._asked = 0
        self._left_s = ANSWER_S
        if host.connection_kind(hop.peer_id) is None:
            self._left_s += DIAL_S

    async def fetch_receipt(self, digest: bytes) -> bytes | None:
        """The receipt with this digest; None if the peer does not hand it out.

        Raises:
            PeerError, NotTheirs: As `fetch_piece`.
        """
        return (await self._ask([digest], MAX_RECEIPT_BYTES)).get(digest)

    async def fetch_piece(self, sizes: Mapping[bytes, int]) -> dict[bytes, bytes]:
        """Contents that the peer holds of the digests `sizes`, given with their bytes: `next_piece` makes it.

        Raises:
            PeerError: It cannot be reached, is late, or answers something else.
            NotTheirs: As far as can be told from here, that may be our own line.
        """
        total = sum(sizes.values())
        self._left_s += total / LEAST_BYTES_PER_S
        return await self._ask([*sizes], max(total, 1))

    async def _ask(self, digests: Sequence[bytes], max_bytes: int) -> dict[bytes, bytes]:
        """Ask, and again after a pause if the peer hung up: it answers only so many at a time."""
        for pause_s in RETRY_S:
            try:
                return await self._ask_once(digests, max_bytes)
            except PeerVanished as exc:
                if self._left_s <= 0:
                    raise
                logger.debug("audit.asks_again peer=%s why=%s", self.hop.peer_id, exc)
                await trio.sleep(pause_s)
        return await self._ask_once(digests, max_bytes)

    async def _ask_once(self, digests: Sequence[bytes], max_bytes: int) -> dict[bytes, bytes]:
        self._asked += 1
        if self._asked > ASKS_AT_ONCE // 2:  # a peer answers only so many
            await trio.sleep(1 / ASKS_PER_S)
        self._left_s += ASK_S
        began_at, arrived, own = trio.current_time(), self.line.arrived, 0

        def note(received: int) -> None:
            nonlocal own
            own += received
            self.line.note(received)

        try:
            return await fetch_evidence(
                self._host,
                self.hop.peer_id,
                digests,
                self.hop.addrs,
                max_bytes=max_bytes,
                within_s=max(self._left_s, 0.0),
                hearsay=False,
                on_bytes=note,
            )
        except PeerError as exc:
            spent_s = trio.current_time() - began_at
            # Without its own bytes: or it would only have to keep our line busy, and never come to an end.
            if self._is_ours(spent_s, self.line.arrived - arrived - own):
                raise NotTheirs(str(exc)) from exc
            raise
        finally:
            self._left_s -= trio.current_time() - began_at

    def _is_ours(self, spent_s: float, arrived: int) -> bool:
        """True if this side's line is down as far as one can see, or was busy with others' evidence."""
        connected = self._host.connected_peers()
        is_down = not connected or (
            self._host.connection_kind(self.hop.peer_id) is None and {*connected} <= {self.hop.peer_id}
        )
        return is_down or (spent_s >= ANSWER_S and arrived >= spent_s * LEAST_BYTES_PER_S)


def next_piece(sizes: Mapping[bytes, int]) -> dict[bytes, int]:
    """The first of these digests, with their bytes: as many as are asked for at once."""
    piece: dict[bytes, int] = {}
    total = 0
    for digest, size in sizes.items():
        total += size
        if piece and (total > PIECE_BYTES or len(piece) == MAX_DIGESTS):
            break
        piece[digest] = size
    return piece
