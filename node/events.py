"""Events of a node, for its operator. With `--json` each is one object on a line."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class _Event(msgspec.Struct, frozen=True, tag_field="event"):
    """An object whose `event` key names it."""


class Starting(_Event, frozen=True, tag="starting"):
    """The node has its identity and listens; it does not serve yet."""

    peer_id: str
    addrs: tuple[str, ...]
    model: str
    revision: str


class Loading(_Event, frozen=True, tag="loading"):
    """The node has chosen its blocks and fetches and loads them."""

    blocks: tuple[int, int]
    reason: str  # why these: "asked for", or what the swarm lacks


class Ready(_Event, frozen=True, tag="ready"):
    """The node serves."""

    peer_id: str
    addrs: tuple[str, ...]
    model: str
    revision: str
    blocks: tuple[int, int] | None  # None: it introduces peers and holds no blocks
    dtype: str
    device: str
    tokens_per_s: float
    cache_tokens: int
    cache_bytes: int = 0  # of memory, that those tokens may take
    weights_bytes: int = 0  # of memory, that the blocks take
    relay_bytes_per_s: float = 0.0  # of the line at most, for connections of peers behind routers; 0: none


class Joined(_Event, frozen=True, tag="joined"):
    """Peers that the node has joined; told once that is known, and when more have answered."""

    peers: int  # connected at the moment
    answered: tuple[str, ...]  # addresses of bootstrap peers
    silent: tuple[tuple[str, str], ...]  # addresses of the others, each with why


class Reached(_Event, frozen=True, tag="reached"):
    """Reachability of the node, found out or changed."""

    reachability: str  # public, mapped, private or unknown, as in announcements
    nat: str  # none, firewall, port-preserving, symmetric or unknown
    addrs: tuple[str, ...]
    relays: tuple[str, ...]  # ids of the peers that carry connections to it
    description: str


class SessionOpened(_Event, frozen=True, tag="session_opened"):
    """A client reserved a session."""

    peer_id: str
    blocks: tuple[int, int]
    max_tokens: int
    sessions: int  # open after this


class SessionClosed(_Event, frozen=True, tag="session_closed"):
    """A session ended, for the reason given."""

    peer_id: str
    tokens: int  # tokens computed
    reason: str
    sessions: int


class SessionRefused(_Event, frozen=True, tag="session_refused"):
    """A client asked for a session and did not get it."""

    peer_id: str
    code: str
    message: str


class Verified(_Event, frozen=True, tag="verified"):
    """Spare time went into checking others: so many hops, by how that came out."""

    audits: int
    passed: int
    failed: int
    suspect: int


class NodeLeaving(_Event, frozen=True, tag="leaving"):
    """The node has said goodbye to the swarm and stops."""

    sessions: int


class Stopped(_Event, frozen=True, tag="stopped"):
    """The node has ended; what it did since it began."""

    uptime_s: float
    sessions: int
    tokens: int
    refusals: int  # sessions, streams and connections
    bytes_sent: int
    bytes_received: int
    bytes_relayed: int  # for others, in bytes of theirs
    audits_of_us: int  # for which our evidence was asked


Event: TypeAlias = (
    Starting
    | Joined
    | Stopped
    | Loading
    | Reached
    | Ready
    | SessionOpened
    | SessionClosed
    | SessionRefused
    | Verified
    | NodeLeaving
)

_encoder = msgspec.json.Encoder()


def to_json(event: Event) -> str:
    """The event as one line of JSON."""
    return _encoder.encode(event).decode()
