"""Types of routing: candidates and a request go in, routes come out, an outcome comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pinfer.models.span import BlockSpan

from .announcement import Announcement
from .coordinates import Coordinate


@dataclass(frozen=True, slots=True)
class Hop:
    """A peer and the blocks it computes for this route, which may be fewer than it serves.

    Attributes:
        addrs: Where it says that it is.
        dtype: Numerics that it has announced, which it is held to; empty: not known.
    """

    peer_id: str
    span: BlockSpan
    addrs: tuple[str, ...] = field(default=(), compare=False)
    dtype: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Route:
    """Hops whose spans follow each other without a gap; no peer appears twice."""

    hops: tuple[Hop, ...]

    @property
    def peer_ids(self) -> tuple[str, ...]:
        return tuple(hop.peer_id for hop in self.hops)

    def __str__(self) -> str:
        return " > ".join(f"{hop.span} on {hop.peer_id}" for hop in self.hops)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A peer that might become a hop: what it says of itself, and what we measured.

    Attributes:
        rtt_ms: Measured round trip between us and the peer, over the connection there is.
        relayed: Our connection to the peer goes through a relay.
        compute_ms: Measured time of one token through the peer's whole span. Where it is known it
            counts, and the announced `tokens_per_s` does not.
        found_in: Address ranges in which a connection with the peer was had; empty if those are in many
            networks, None if there was no connection yet.
        named_in: Those that the names among its addresses resolve to, as far as they were looked up.
    """

    announcement: Announcement
    rtt_ms: float | None = None
    relayed: bool = False
    compute_ms: float | None = None
    found_in: frozenset[str] | None = None
    named_in: frozenset[str] = frozenset()

    @property
    def peer_id(self) -> str:
        return self.announcement.peer_id

    @property
    def span(self) -> BlockSpan:
        return self.announcement.span

    def hop(self, span: BlockSpan | None = None) -> Hop:
        """Hop of this peer for `span`, or for all it serves."""
        return Hop(self.peer_id, span or self.span, self.announcement.addrs, self.announcement.dtype)


@dataclass(frozen=True, slots=True)
class Edge:
    """Measurements between two peers, one of which may have told us."""

    rtt_ms: float
    relayed: bool = False


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """Requirements that a route has to meet.

    Attributes:
        hidden_bytes_per_token: Size on the wire of what one hop hands to the next, per token.
        tokens: Prompt and answer together: the cache every hop must have room for.
        excluded: Peers that must not be used, for example because they just failed.
        coordinate: Where the client sits; None if it does not know.
        edges: Measured facts between pairs of peers, by `(from, to)`; looked up in both directions.
        span: The blocks to cover; None for all of the model. A failover asks for a part.
        source: The peer that hands over the first hidden state; None for the client.
        sink: The peer that takes over the last one; None for the client.
        min_integrity: Peers that score less must not be used.
        spoilt_ranges: Address ranges where banned peers were: no newcomer from there is tried out.
        ends: The client holds no weights: the first hop embeds, and the last one draws.
        packs: A prompt is to travel packed, so every hop has to take that.
        serve_command: What starts a node of this model in this swarm, for messages; `--blocks` is appended.
    """

    revision: str
    num_blocks: int
    hidden_bytes_per_token: int
    tokens: int
    excluded: frozenset[str] = frozenset()
    coordinate: Coordinate | None = None
    edges: Mapping[tuple[str, str], Edge] = field(default_factory=dict[tuple[str, str], Edge])
    span: BlockSpan | None = None
    source: Candidate | None = None
    sink: Candidate | None = None
    min_integrity: float = 0.0
    spoilt_ranges: frozenset[str] = frozenset()
    serve_command: str = "p2pinfer node"
    ends: bool = False
    packs: bool = False

    @property
    def wanted(self) -> BlockSpan:
        return self.span or BlockSpan(0, self.num_blocks)


@dataclass(frozen=True, slots=True)
class RouteOutcome:
    """Outcome of a session over a route.

    Attributes:
        error: One line, if `ok` is False.
        failed_peer: Whose fault it was, where that is known.
        told_by: The neighbour of `failed_peer` on whose word alone that rests; None if it was seen here.
        tokens: Tokens that came back over the route.
        seconds: From the first step sent to the last token or the failure.
        per_hop_ms: Median time of a decode step at each hop, in the route's order.
    """

    ok: bool
    error: str | None = None
    failed_peer: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    per_hop_ms: tuple[float, ...] = ()
    told_by: str | None = None
