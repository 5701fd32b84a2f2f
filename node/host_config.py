"""Settings of a host, apart from host.py so that reading them imports no libp2p."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Settings of a host: where it listens, whom it admits, what it grants each peer."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")  # multiaddrs; none: only dial out
    announce: tuple[str, ...] = ()  # multiaddrs that lead here from outside, such as a forwarded port's
    swarm_key: Path | None = None  # file with the key of a private swarm; not set: the public swarm
    allow: tuple[str, ...] = ()  # peers, or files of them, that alone we deal with; clients:PEER: as clients
    deny: tuple[str, ...] = ()  # peers, or files of them, that we do not deal with; scopes as above
    dial_timeout_s: float = 10.0  # for reaching a peer on any of its addresses, seconds
    dial_stagger_s: float = 0.1  # between the first tries of a peer's addresses, seconds
    stream_timeout_s: float = 10.0  # for opening a stream to a connected peer, seconds
    handshake_timeout_s: float = 10.0  # for encryption on a new connection, the protocol on a stream, seconds
    user_timeout_s: float = 2.8  # after which a connection that acknowledges nothing sent is dead, seconds
    relay_head_start_s: float = 0.5  # that a peer's own addresses have before ways through a relay, seconds
    relays: int = 2  # where to be reached if this machine cannot be; 0: nowhere
    punch: bool = True  # turn relayed connections into direct ones where the routers let us
    punch_wait_s: float = 2.0  # how long whoever connects through a relay waits for that, seconds
    upnp: bool = True  # ask the router for a port where it hides this machine
    mdns: bool = True  # find peers in the local network, and be found
    max_connections: int = 512  # connections at once, both directions
    max_connections_per_peer: int = 4  # connections of one peer at once
    max_connections_per_address: int = 128  # connections accepted from one IP address at once
    max_streams: int = 4096  # streams that all peers together may have open to us at once
    max_streams_per_peer: int = 256  # streams that one peer may have open to us at once
    streams_per_s: float = 200.0  # streams that one peer may open in the long run, a second
    streams_at_once: int = 500  # streams that one peer may open in a burst

    def __post_init__(self) -> None:
        for name in (
            "dial_timeout_s",
            "stream_timeout_s",
            "handshake_timeout_s",
            "user_timeout_s",
            "max_connections",
            "max_connections_per_peer",
            "max_connections_per_address",
            "streams_per_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        for name in ("relay_head_start_s", "relays", "punch_wait_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.dial_stagger_s < 0:
            raise ValueError("dial_stagger_s must not be negative")
        if min(self.max_streams, self.max_streams_per_peer, self.streams_at_once) < 1:
            raise ValueError("max_streams, max_streams_per_peer and streams_at_once must be at least 1")
