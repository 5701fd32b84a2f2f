"""How a host listens and how long it waits. Apart from host.py, so that reading it imports no libp2p."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Where a host listens and what it grants each peer."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)  # multiaddrs to listen on; none: only dial out
    dial_timeout_s: float = 10.0  # for reaching a peer on any of its addresses, seconds
    dial_stagger_s: float = 0.1  # between the first tries of a peer's addresses, seconds
    stream_timeout_s: float = 10.0  # for opening a stream to a connected peer, seconds
    user_timeout_s: float = 10.0  # after which a connection that acknowledges nothing is dead, seconds
    relay_head_start_s: float = 0.5  # that a peer's own addresses have before ways through a relay, seconds
    relays: int = 2  # where to be reached if this machine cannot be; 0: nowhere
    punch: bool = True  # turn relayed connections into direct ones where the routers let us
    punch_wait_s: float = 2.0  # how long whoever connects through a relay waits for that, seconds
    upnp: bool = True  # ask the router for a port where it hides this machine
    mdns: bool = True  # find peers in the local network, and be found
    max_connections: int = 512  # connections at once, both directions
    max_streams_per_peer: int = 256  # streams a peer may have open to us at once, on each connection

    def __post_init__(self) -> None:
        for name in ("dial_timeout_s", "stream_timeout_s", "user_timeout_s", "max_connections"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        for name in ("relay_head_start_s", "relays", "punch_wait_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.dial_stagger_s < 0 or self.max_streams_per_peer < 1:
            raise ValueError("dial_stagger_s must not be negative, and max_streams_per_peer at least 1")
