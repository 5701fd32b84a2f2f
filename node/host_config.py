"""Settings of a host, apart from host.py so that reading them imports no libp2p."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HostConfig:
    """Settings of a host: where it listens, whom it admits, what it grants each peer."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0")  # multiaddrs; empty: only dial out
    announce: tuple[str, ...] = ()  # public multiaddrs of this peer, for example of a forwarded port
    swarm_key: Path | None = None  # file with the key of a private swarm; not set: the public swarm
    allow: tuple[str, ...] = ()  # the only peers to accept: ids or files; clients:PEER limits the role
    deny: tuple[str, ...] = ()  # peers to reject: ids or files; roles as in allow
    dial_timeout_s: float = 10.0  # for reaching a peer on any of its addresses, seconds
    dial_stagger_s: float = 0.1  # between the first tries of a peer's addresses, seconds
    stream_timeout_s: float = 10.0  # for opening a stream to a connected peer, seconds
    handshake_timeout_s: float = 10.0  # for encrypting a connection or negotiating a stream, seconds
    # without acknowledgement of sent data, a connection is dead, seconds; longer on thin lines and far away
    user_timeout_s: float = 5.0
    relay_head_start_s: float = 0.5  # a peer's direct addresses are tried this long before relays, seconds
    relays: int = 2  # relays to reserve if this machine is not reachable; 0: none
    punch: bool = True  # upgrade relayed connections to direct ones by hole punching
    punch_wait_s: float = 0.5  # how long a dialler waits for hole punching to succeed, seconds
    upnp: bool = True  # request a port from the router if this machine is behind NAT
    mdns: bool = True  # discover peers on the local network, and be discovered
    max_connections: int = 512  # connections at once, both directions
    max_connections_per_peer: int = 4  # connections of one peer at once
    max_connections_per_address: int = 128  # connections accepted at once from one IPv4 address or IPv6 /56
    max_streams: int = 4096  # streams that all peers together may have open to us at once
    max_streams_per_peer: int = 256  # streams that one peer may have open to us at once
    streams_per_s: float = 200.0  # streams that one peer may open, average per second
    streams_at_once: int = 500  # streams that one peer may open in a burst
    loop_share: float = 0.25  # of a core: what messages of all peers may take before the largest takers wait
    loop_share_at_work: float = 0.1  # the same while steps of sessions are computed, if it is less

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
        for name in ("loop_share", "loop_share_at_work"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1")
        for name in ("relay_head_start_s", "relays", "punch_wait_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.dial_stagger_s < 0:
            raise ValueError("dial_stagger_s must not be negative")
        if min(self.max_streams, self.max_streams_per_peer, self.streams_at_once) < 1:
            raise ValueError("max_streams, max_streams_per_peer and streams_at_once must be at least 1")


def dialling_only(config: HostConfig) -> HostConfig:
    """The same settings for a host under another identity, that nobody is to reach.

    It does not listen, and does not say the addresses that lead to the node whose settings these are: a check
    that did would tell every hop which node it comes from.
    """
    return replace(config, listen=(), announce=())
