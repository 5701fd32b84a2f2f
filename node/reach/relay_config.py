"""Settings of a relay, apart from relay_server.py so that reading them imports no libp2p."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """Limits on what a reachable node spends on those that are not.

    A decode step of a large model is 20 KB a hop, so a megabyte a second carries fifty of them, for peers
    that mostly find a direct way after seconds. Of a home line's upload, 20 Mbit/s or 2.5 MB/s, it leaves
    more than half. A prefill of 4,000 tokens is 64 MB and takes two minutes there: who lends a server gives
    more. One peer that wants more waits for itself, not for others.
    """

    enabled: bool = True  # relay connections of peers behind routers, if this node is reachable
    max_reservations: int = 256  # reservations at once: peers reachable through this node
    max_reservations_per_ip: int = 16  # reservations from one IP address
    reservation_s: float = 3600.0  # how long a reservation lasts unless it is renewed, seconds
    max_circuits: int = 128  # relayed connections at once
    max_circuits_per_peer: int = 16  # relayed connections with one peer at either end
    max_circuit_bytes: int = 8 << 30  # of one relayed connection, both directions together, bytes
    max_circuit_s: float = 14_400.0  # how long one connection is relayed, seconds
    bytes_per_s: float = 1e6  # bandwidth of all relayed connections together; 0: do not relay
    bytes_per_s_per_peer: float = 500e3  # bandwidth of all relayed connections that one peer opened

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name not in ("enabled", "bytes_per_s") and getattr(self, each.name) <= 0:
                raise ValueError(f"{each.name} is {getattr(self, each.name):g}; it must be above 0")
        if self.bytes_per_s < 0:
            raise ValueError(f"bytes_per_s is {self.bytes_per_s:g}; it must be 0 or more")

    @property
    def granted_bytes_per_s(self) -> float:
        """Bytes per second that all carried connections may take; 0 if none is carried."""
        return self.bytes_per_s if self.enabled else 0.0
