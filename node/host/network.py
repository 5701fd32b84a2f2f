"""Interface of a host for those who talk to peers over it: sessions, audits, the serving side, tables.

`Host` is one, over libp2p. Tests have another, in memory; a type checker holds both to this.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeAlias

import trio

from p2pinfer.node.transport.connection_gate import Gate
from p2pinfer.node.transport.counters import Counts
from p2pinfer.node.transport.peer_stream import PeerStream

Handler: TypeAlias = Callable[[PeerStream], Awaitable[None]]


class Network(Protocol):
    """Peers that can be reached, and the protocols that this process answers."""

    @property
    def peer_id(self) -> str:
        """This process's own id."""
        ...

    @property
    def addrs(self) -> tuple[str, ...]:
        """Multiaddrs at which this process can be reached."""
        ...

    @property
    def counts(self) -> Counts:
        """Counters of what this process does."""
        ...

    @property
    def gate(self) -> Gate:
        """Decides which peers may do what here."""
        ...

    @property
    def sign(self) -> Callable[[bytes], bytes]:
        """Function that signs some bytes as this process, in 64 bytes."""
        ...

    @property
    def verify(self) -> Callable[[str, bytes, bytes], bool]:
        """Function that checks a signature: (peer id, what was signed, signature)."""
        ...

    def serve(self, protocol: str, handler: Handler, *, is_metered: bool = True) -> None:
        """Answer streams of a protocol by `handler` from now on.

        Args:
            is_metered: Count what the handler takes of the event loop among the peer's messages.
        """
        ...

    def stop_serving(self, protocol: str) -> None:
        """Answer no more streams of a protocol; those that are open stay."""
        ...

    def connected_peers(self) -> list[str]:
        """Peers with a connection to this process."""
        ...

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"] | None:
        """Kind of the connection to a peer; None without one."""
        ...

    async def open_stream(
        self,
        peer_id: str,
        protocol: str,
        addrs: Sequence[str] = (),
        *,
        hearsay: bool = False,
        optimistic: bool = False,
    ) -> PeerStream:
        """Open a stream, dialling `addrs` and what is known of the peer if there is no connection.

        Args:
            hearsay: True if another peer named the addresses; how often such are dialled is bounded.
            optimistic: Do not wait for the peer to agree to the protocol: the first receive does, and raises.

        Raises:
            PeerError: The peer cannot be reached, or does not answer the protocol.
        """
        ...

    async def ping(self, peer_id: str) -> float:
        """Seconds of one round trip to a connected peer.

        Raises:
            PeerError: It is not connected, or gone.
        """
        ...

    def within(
        self, base_s: float, peer_ids: Iterable[str], round_trips: float
    ) -> AbstractContextManager[trio.CancelScope]:
        """Cancel what runs inside after `base_s` and so many round trips to the farthest of the peers."""
        ...
