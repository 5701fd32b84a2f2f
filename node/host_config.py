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
    max_connections: int = 512  # connections at once, both directions
    max_streams_per_peer: int = 256  # streams a peer may have open to us at once, on each connection

    def __post_init__(self) -> None:
        for name in ("dial_timeout_s", "stream_timeout_s", "user_timeout_s", "max_connections"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if self.dial_stagger_s < 0 or self.max_streams_per_peer < 1:
            raise ValueError("dial_stagger_s must not be negative, and max_streams_per_peer at least 1")
