"""Source of evidence: a peer that is asked for receipts and tensors, and the time that it has left for them.

How long a peer may take is part of the protocol (docs/wire.md, Evidence): a hop that is late is so by
everybody's reckoning. The time is its own: it does not run while this side pauses. And where this side's line
was busy with other evidence, or seems to be down, nobody was late.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from p2pinfer.errors import PeerError, PeerVanished
from p2pinfer.node.evidence.store import (
    ANSWER_S,
    ASKS_AT_ONCE,
    ASKS_PER_S,
    LEAST_BYTES_PER_S,
    MAX_CONTENT_BYTES,
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
            PeerError, NotTheirs: As `fetch_all`.
        """
        return (await self._ask([digest], MAX_RECEIPT_BYTES)).get(digest)

    async def fetch_all(self, digests: Sequence[bytes], total_bytes: int) -> dict[bytes, bytes]:
        """Contents that the peer holds of `digests`, which come to so many bytes.

        Raises:
            PeerError: It cannot be reached, is late, or answers something else.
            NotTheirs: As far as can be told from here, that may be our own line.
        """
        self._left_s += total_bytes / LEAST_BYTES_PER_S
        found: dict[bytes, bytes] = {}
        missing = list(digests)
        # As many as an honest peer needs, which fills its answers. Each buys time, so they have an end.
        for _ in range(2 * (len(missing) // MAX_DIGESTS + total_bytes // MAX_CONTENT_BYTES + 1)):
            if not missing:
                break
            found |= await self._ask(missing[:MAX_DIGESTS], max(total_bytes, 1))
            missing = [digest for digest in missing if digest not in found]
        return found

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
        began_at, arrived = trio.current_time(), self.line.arrived
        try:
            return await fetch_evidence(
                self._host,
                self.hop.peer_id,
                digests,
                self.hop.addrs,
                max_bytes=max_bytes,
                within_s=max(self._left_s, 0.0),
                hearsay=False,
                on_bytes=self.line.note,
            )
        except PeerError as exc:
            spent_s = trio.current_time() - began_at
            if self._is_ours(spent_s, self.line.arrived - arrived):
                raise NotTheirs(str(exc)) from exc
            raise
        finally:
            self._left_s -= trio.current_time() - began_at

    def _is_ours(self, spent_s: float, arrived: int) -> bool:
        """True if this side's line is down as far as one can see, or was busy with evidence all the time."""
        connected = self._host.connected_peers()
        is_down = not connected or (
            self._host.connection_kind(self.hop.peer_id) is None and {*connected} <= {self.hop.peer_id}
        )
        return is_down or (spent_s >= ANSWER_S and arrived >= spent_s * LEAST_BYTES_PER_S)
