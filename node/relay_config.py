"""What a node spends on carrying others' connections. Apart from relay.py: reading it imports no libp2p."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """What a node that can be reached spends on those who cannot.

    A decode step of a large model is 20 KB a hop, a prefill of 4,000 tokens 64 MB: the byte limits let that
    through at home-line speed, and a peer that wants more waits for itself, not for others.
    """

    enabled: bool = True  # carry connections for peers behind routers, where this node can be reached
    max_reservations: int = 256  # peers that others may reach through this node
    max_reservations_per_ip: int = 16  # of them from one IP address
    reservation_s: float = 3600.0  # how long a reservation lasts unless it is renewed, seconds
    max_circuits: int = 128  # connections carried at once
    max_circuits_per_peer: int = 16  # of them with any one peer at either end
    max_circuit_bytes: int = 8 << 30  # of one connection, both directions together
    max_circuit_s: float = 14_400.0  # how long one connection is carried, seconds
    bytes_per_s: float = 32e6  # of all connections together
    bytes_per_s_per_peer: float = 4e6  # of all connections that one peer has asked for

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "enabled" and getattr(self, each.name) <= 0:
                raise ValueError(f"{each.name} is {getattr(self, each.name):g}; it must be above 0")
