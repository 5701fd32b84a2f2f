"""Hosts that reach each other through memory, for tests of what runs on top of libp2p."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, cast

import trio
import trio.testing
from blake3 import blake3

from p2pinfer.errors import PeerError, PeerUnreachable
from p2pinfer.node.host.network import Handler
from p2pinfer.node.host.round_trips import RoundTrips
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.transport.connection_gate import Gate
from p2pinfer.node.transport.counters import Counts
from p2pinfer.node.transport.peer_stream import PeerStream, StreamBroken


def sign(peer_id: str, payload: bytes) -> bytes:
    """What stands for a signature where peer ids are names."""
    return blake3(peer_id.encode() + payload).digest(64)


def verify(peer_id: str, payload: bytes, signature: bytes) -> bool:
    return signature == sign(peer_id, payload)


class MemoryStream(trio.abc.Stream):
    """One end of a pipe to `peer_id`, with what `PeerStream` adds to a trio stream."""

    def __init__(
        self,
        pipe: trio.abc.Stream,
        peer_id: str,
        frozen: dict[str, trio.Event],
        *,
        is_relayed: bool = False,
        address_range: str = "",
    ) -> None:
        """What is sent to or received from a `frozen` peer waits until it is thawed."""
        self.peer_id = peer_id
        self.address_range = address_range or peer_id
        self.is_relayed = is_relayed
        self.remote_address: tuple[str, int] | None = None
        self.local_ip = ""
        self._pipe = pipe
        self._frozen = frozen
        self._waits: list[trio.CancelScope] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._thawed()
        try:
            await self._pipe.send_all(data)
        except trio.BrokenResourceError as exc:
            raise StreamBroken(f"peer {self.peer_id} vanished", self.peer_id) from exc

    async def wait_send_all_might_not_block(self) -> None:
        await self._pipe.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        received = await self._pipe.receive_some(max_bytes)
        await self._thawed()
        return received

    async def _thawed(self) -> None:
        while (thawed := self._frozen.get(self.peer_id)) is not None:
            with trio.CancelScope() as scope:
                self._waits.append(scope)
                await thawed.wait()
            self._waits.remove(scope)
            if scope.cancelled_caught:
                raise trio.ClosedResourceError

    async def aclose(self) -> None:
        self._wake()
        await self._pipe.aclose()

    async def reset(self) -> None:
        self._wake()
        await trio.aclose_forcefully(self._pipe)

    def _wake(self) -> None:
        """Let nobody wait for a frozen peer on a stream that is closed."""
        for scope in self._waits:
            scope.cancel()


class MemoryNetwork:
    """Everybody who can be reached, and the nursery in which they answer."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.ping_s = 0.01
        self.addresses: dict[str, str] = {}  # IP addresses of peers, of those that have one
        self.relayed: set[tuple[str, str]] = set()  # who has a connection through a relay only, to whom
        self.hosts: dict[str, MemoryHost] = {}
        self.streams: list[tuple[str, str, MemoryStream]] = []  # (from, to, the opener's end)
        self.frozen: dict[str, trio.Event] = {}
        self.ranges: dict[str, str] = {}  # address ranges of peers; a peer that is not here has its own
        self.swallowing: dict[str, float] = {}  # by peer, seconds for which it answers no dial
        self.dialled: list[tuple[str, str, tuple[str, ...]]] = []  # (from, to, addresses)

    def host(self, peer_id: str) -> MemoryHost:
        host = self.hosts[peer_id] = MemoryHost(self, peer_id)
        return host

    async def cut(self, source: str, target: str) -> None:
        """Break every stream that `source` opened to `target`."""
        for opener, answerer, stream in self.streams:
            if (opener, answerer) == (source, target):
                await stream.reset()

    def freeze(self, peer_id: str) -> None:
        """Let a peer fall silent: its streams stay, and others hear and are heard no more."""
        self.frozen[peer_id] = trio.Event()

    def thaw(self, peer_id: str) -> None:
        """Let a frozen peer go on."""
        self.frozen.pop(peer_id).set()

    async def kill(self, peer_id: str) -> None:
        """Let a peer vanish: nobody reaches it any more, and every stream it has breaks."""
        del self.hosts[peer_id]
        for opener, answerer, stream in self.streams:
            if peer_id in (opener, answerer):
                await stream.reset()


class MemoryHost:
    """`Network` whose streams are pipes in memory. Whoever is handed one holds it to that."""

    def __init__(self, network: MemoryNetwork, peer_id: str) -> None:
        self.peer_id = peer_id
        self.addrs = (f"/memory/{peer_id}",)
        self.listening: tuple[str, ...] = ()
        self.counts = Counts()
        self.gate = Gate(HostConfig())
        self.handlers: dict[str, Handler] = {}
        self.sign = partial(sign, peer_id)
        self.verify = verify
        self.round_trips = RoundTrips()  # as a test notes them
        self._network = network

    def serve(self, protocol: str, handler: Handler, *, is_metered: bool = True) -> None:
        self.handlers[protocol] = handler

    def stop_serving(self, protocol: str) -> None:
        del self.handlers[protocol]

    def connected_peers(self) -> list[str]:
        absent = {self.peer_id, *self._network.swallowing}
        return [peer_id for peer_id in self._network.hosts if peer_id not in absent]

    def connection_kind(self, peer_id: str) -> Literal["direct", "relayed"] | None:
        if peer_id not in self._network.hosts or peer_id in self._network.swallowing:
            return None
        return "relayed" if (self.peer_id, peer_id) in self._network.relayed else "direct"

    def remote_address(self, peer_id: str) -> tuple[str, int] | None:
        ip = self._network.addresses.get(peer_id)
        return (ip, 4001) if ip is not None and self.connection_kind(peer_id) == "direct" else None

    def within(
        self, base_s: float, peer_ids: Iterable[str], round_trips: float
    ) -> AbstractContextManager[trio.CancelScope]:
        return self.round_trips.within(base_s, peer_ids, round_trips)

    def rtt_s(self, peer_id: str) -> float | None:
        return None

    async def ping(self, peer_id: str) -> float:
        await trio.lowlevel.checkpoint()
        if peer_id not in self._network.hosts:
            raise PeerUnreachable(f"peer {peer_id} is not connected", peer_id)
        return self._network.ping_s

    async def connect(self, peer_id: str, addrs: Sequence[str] = (), *, hearsay: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self._network.dialled.append((self.peer_id, peer_id, tuple(addrs)))
        if peer_id in self._network.swallowing:
            await trio.sleep(self._network.swallowing[peer_id])
        if peer_id not in self._network.hosts:
            raise PeerUnreachable(f"peer {peer_id} cannot be reached", peer_id)
        self._network.swallowing.pop(peer_id, None)

    async def open_stream(
        self,
        peer_id: str,
        protocol: str,
        addrs: Sequence[str] = (),
        *,
        hearsay: bool = False,
        optimistic: bool = False,
    ) -> PeerStream:
        await trio.lowlevel.checkpoint()
        if self.connection_kind(peer_id) is None:
            self._network.dialled.append((self.peer_id, peer_id, tuple(addrs)))
        there = self._network.hosts.get(peer_id)
        if there is None or protocol not in there.handlers:
            raise PeerUnreachable(f"peer {peer_id} cannot be reached", peer_id)
        ours, theirs = trio.testing.memory_stream_pair()
        is_relayed = (self.peer_id, peer_id) in self._network.relayed
        stream = MemoryStream(ours, peer_id, self._network.frozen, is_relayed=is_relayed)
        self._network.streams.append((self.peer_id, peer_id, stream))
        answer = there.handlers[protocol]
        address_range = self._network.ranges.get(self.peer_id, "")
        far_end = MemoryStream(theirs, self.peer_id, {}, is_relayed=is_relayed, address_range=address_range)
        for end, other in ((stream, peer_id), (far_end, self.peer_id)):
            if (ip := self._network.addresses.get(other)) is not None and not is_relayed:
                end.remote_address = (ip, 4001)
        self._network.nursery.start_soon(_answer, answer, far_end)
        return cast(PeerStream, stream)


async def _answer(handler: Handler, stream: MemoryStream) -> None:
    try:
        await handler(cast(PeerStream, stream))
    except PeerError:
        await stream.reset()
    else:
        await stream.aclose()
