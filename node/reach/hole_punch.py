"""Hole punching (DCUtR): both sides of a relayed connection dial each other at the same moment.

    B, who was reached through a relay          A, who connected through it
      CONNECT, where B is seen from outside ->
                    <- CONNECT, where A is seen from outside
      SYNC ->                                     dials at once
      dials half a round trip later

Each one's SYN opens its own router for the other's. Both leave from the port that the other side expects, so
the two dials meet in one connection: A speaks first in its handshake, B answers. That needs routers that keep
ports, or a port known to be open; where a router invents a port for every destination nothing is dialled,
since a guess among 65,536 would only knock at strangers' doors. If A can be reached as it is, B's ordinary
dial, which starts as soon as B knows A's addresses, is all it takes.

libp2p's own DCUtR (0.8.1) dials each address in turn for ten seconds, gives up on a refused one, which is
what a router that answers for closed ports sends, and tells nobody when it is over. The messages are its own.

Two peers that look for each other may each come through a relay, and each would begin an attempt. Both would
dial from the same ports, and whoever speaks first in one would wait to be spoken to in the other. So one of
them counts, that of the higher peer id, and the other is dropped.

Where a peer says it can be met may be a victim's address. So few addresses are dialled, after each refusal a
little later than after the one before, and a host is dialled in few rounds only, whoever names it.

The relayed connection stays: what runs on it goes on, streams opened from then on are direct (`Host`).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from typing import Final

import trio
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr
from multiaddr.exceptions import BinaryParseError, ProtocolLookupError

from p2pinfer.errors import PeerError, PeerVanished, ProtocolViolation
from p2pinfer.node.concurrency.nurseries import innermost
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.addresses import parse_tcp
from p2pinfer.node.transport.delimited import receive_message, send_message
from p2pinfer.node.transport.peer_stream import PeerStream

from .reachability import is_global

logger = logging.getLogger(__name__)

PUNCH_PROTOCOL: Final = "/libp2p/dcutr"
MAX_ADDRS: Final = 8  # of a peer's that are looked at
MAX_HOSTS: Final = 2  # that are dialled, at one port each: one host for each family
ROUNDS: Final = 3
ROUND_S: Final = 4.0  # how long both dial in one round
DIAL_S: Final = 2.5  # for one dial: the SYN goes out twice
AGAIN_S: Final = 0.03  # after a refusal, about; then ever later
AGAIN_GROWTH: Final = 1.2
LAST_AGAIN_S: Final = 0.5
ROUNDS_PER_S: Final = 1 / 120  # towards one host, whoever says that it is there
ROUNDS_AT_ONCE: Final = 3
ROUND_TRIPS: Final = 6  # that a dial takes, beside these times
ANSWER_S: Final = 10.0  # for the other side's messages
PUNCH_ROUND_TRIPS: Final = 6  # that an attempt takes from the relayed connection to the direct one
BETWEEN_ROUNDS_S: Final = 1.0


class HolePuncher:
    """Hole punching for one host, on either side.

    Args:
        outside: Gives the multiaddrs at which a peer that dials at the same moment would meet us, or none.
        source: Gives the local address and port that we dial from, or None; for IPv6 if its argument is true.
        let_in: Asked for when a peer cannot be met and has to dial us: lets it in, and says if that may work.
        on_end: Told the peer's id, and whether there is a direct connection, whenever an attempt is over.
    """

    def __init__(
        self,
        host: Host,
        outside: Callable[[], Sequence[str]],
        source: Callable[[bool], tuple[str, int] | None],
        let_in: Callable[[], bool],
        *,
        wait_s: float,
        on_end: Callable[[str, bool], None] = lambda peer_id, direct: None,
    ) -> None:
        self._host = host
        self._outside = outside
        self._source = source
        self._let_in = let_in
        self._wait_s = wait_s
        self._on_end = on_end
        self._over: dict[str, trio.Event] = {}  # by peer that we wait for to punch
        self._begun: dict[str, trio.CancelScope] = {}  # by peer, an attempt of ours
        self._turns: dict[str, trio.Lock] = {}  # by peer that has come through relays
        self._rounds = RateLimit(ROUNDS_PER_S, ROUNDS_AT_ONCE)

    def register(self) -> None:
        """Answer peers that want to punch, and have whoever connects through a relay wait for them."""
        self._host.serve(PUNCH_PROTOCOL, self._answer)
        self._host.when_relayed(self._wait)

    async def arrived(self, peer_id: str) -> None:
        """Punch a way to a peer that has connected to us through a relay; returns when that is over.

        A peer may come through two relays at once and hang up on one of them, which cancels this call. So one
        call at a time makes attempts, and the next one begins as soon as that has ended.
        """
        turn = self._turns.setdefault(peer_id, trio.Lock())
        try:
            async with turn:
                await self._attempt(peer_id)
        finally:
            if not turn.locked():
                self._turns.pop(peer_id, None)

    async def _attempt(self, peer_id: str) -> None:
        for attempt in range(ROUNDS):
            try:
                if self._is_direct(peer_id) or not await self._begin(peer_id):
                    break
            except (PeerError, trio.TooSlowError) as exc:
                logger.debug("punch.failed peer=%s attempt=%d why=%s", peer_id, attempt, innermost(exc))
            await trio.sleep(BETWEEN_ROUNDS_S)
        self._on_end(peer_id, self._is_direct(peer_id))

    async def _wait(self, peer_id: str) -> None:
        """Wait until the peer's first attempt is over, a little at most."""
        over = self._over.setdefault(peer_id, trio.Event())
        with trio.move_on_after(self._wait_s) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_if_far, peer_id, patience)
                await over.wait()
                nursery.cancel_scope.cancel()
        self._over.pop(peer_id, None)

    async def _stop_if_far(self, peer_id: str, patience: trio.CancelScope) -> None:
        """End a wait that would be in vain: an attempt takes several round trips."""
        # What the handshake took says it without another one. On a busy computer that is longer than the way.
        handshake_s = self._host.rtt_s(peer_id) or 0.0
        with suppress(PeerError):
            if (
                handshake_s * PUNCH_ROUND_TRIPS > 2 * self._wait_s
                or await self._host.ping(peer_id) * PUNCH_ROUND_TRIPS > self._wait_s
            ):
                patience.cancel()

    async def _begin(self, peer_id: str) -> bool:
        """One round, as B, unless the peer's own counts. Returns whether another one makes sense."""
        with trio.CancelScope() as self._begun[peer_id]:
            try:
                return await self._initiate(peer_id)
            finally:
                self._begun.pop(peer_id, None)
                self._let_go(peer_id)
        with trio.move_on_after(ROUND_S + self._far_s(peer_id)):  # the peer's own is under way
            await self._until_direct(peer_id)
        return True

    def _let_go(self, peer_id: str) -> None:
        """Whoever waits for an attempt to punch need not any more."""
        if peer_id in self._over:
            self._over[peer_id].set()

    async def _initiate(self, peer_id: str) -> bool:
        """One round, as B. Returns whether another one makes sense."""
        async with aclosing(await self._host.open_stream(peer_id, PUNCH_PROTOCOL, optimistic=True)) as stream:
            with trio.fail_after(ANSWER_S):
                sent_at = trio.current_time()
                await send_message(stream, self._connect())
                theirs = self._permitted(_addresses(await receive_message(stream, HolePunch)))
                rtt_s = trio.current_time() - sent_at
                if not theirs:
                    return False
                await send_message(stream, HolePunch(type=HolePunch.SYNC))
            logger.debug("punch.start peer=%s rtt_ms=%.0f addrs=%s", peer_id, rtt_s * 1e3, theirs)
            with trio.move_on_after(ROUND_S + self._far_s(peer_id)):
                if not self._outside():
                    await self._call(peer_id, theirs)
                    return True
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._call, peer_id, theirs)
                    await trio.sleep(rtt_s / 2)
                    nursery.start_soon(self._dial_all, peer_id, theirs, True)
                    await self._until_direct(peer_id)
                    nursery.cancel_scope.cancel()
        return True

    async def _answer(self, stream: PeerStream) -> None:
        """One round, as A."""
        peer_id = stream.peer_id
        if not stream.is_relayed:
            raise ProtocolViolation("there is a direct connection already", peer_id)
        if peer_id in self._begun:
            if self._host.peer_id > peer_id:
                logger.debug("punch.one_is_enough peer=%s", peer_id)
                return
            self._begun[peer_id].cancel()
        is_over = True
        try:
            with trio.fail_after(ANSWER_S):
                theirs = self._permitted(_addresses(await receive_message(stream, HolePunch)))
                hopeless = not theirs and not self._let_in()
                await send_message(stream, self._connect())
                if hopeless:
                    return
                sync = await receive_message(stream, HolePunch)
            if sync.type != HolePunch.SYNC:
                raise ProtocolViolation("no SYNC after CONNECT", peer_id)
            with trio.move_on_after(ROUND_S + self._far_s(peer_id)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._dial_all, peer_id, theirs, False)
                    await self._until_direct(peer_id)
                    nursery.cancel_scope.cancel()
        except trio.TooSlowError as exc:
            raise PeerVanished("said nothing while punching", peer_id) from exc
        except PeerVanished:
            # Of two relays to the peer one has lost the race and was hung up. It begins again over the other.
            is_lost = stream.muxed.muxed_conn.is_closed
            is_over = not is_lost or self._host.connection_kind(peer_id) != "relayed"
            raise
        finally:
            logger.debug("punch.over peer=%s direct=%s", peer_id, self._is_direct(peer_id))
            if is_over:
                self._let_go(peer_id)
                self._on_end(peer_id, self._is_direct(peer_id))

    async def _call(self, peer_id: str, addrs: Sequence[str]) -> None:
        """Dial in the ordinary way: all it takes if the peer can be reached as it is."""
        async with trio.open_nursery() as nursery:
            for address in addrs:
                nursery.start_soon(self._dial, peer_id, address, None, False)

    async def _dial_all(self, peer_id: str, addrs: Sequence[str], responding: bool) -> None:
        """Dial from the port that the peer expects, again and again."""
        async with trio.open_nursery() as nursery:
            for address in addrs:
                source = self._source(address.startswith("/ip6/"))
                if source is not None:
                    nursery.start_soon(self._keep_dialling, peer_id, address, source, responding)

    async def _keep_dialling(
        self, peer_id: str, address: str, source: tuple[str, int], responding: bool
    ) -> None:
        pause_s = AGAIN_S
        while not self._is_direct(peer_id):
            await self._dial(peer_id, address, source, responding)
            await trio.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(pause_s * AGAIN_GROWTH, LAST_AGAIN_S)

    async def _dial(
        self, peer_id: str, address: str, source: tuple[str, int] | None, responding: bool
    ) -> None:
        with trio.move_on_after(DIAL_S + self._far_s(peer_id)):
            try:
                await self._host.dial_from(peer_id, address, source, responding=responding)
            except Exception as exc:  # whatever it is, it is this address's trouble
                logger.debug("punch.dial_failed peer=%s address=%s why=%s", peer_id, address, innermost(exc))

    async def _until_direct(self, peer_id: str) -> None:
        while not self._is_direct(peer_id):
            await trio.sleep(0.02)

    def _far_s(self, peer_id: str) -> float:
        """Seconds that a dial takes for the distance, by what the relayed connection has shown of it."""
        return ROUND_TRIPS * (self._host.rtt_s(peer_id) or 0.0)

    def _is_direct(self, peer_id: str) -> bool:
        return self._host.connection_kind(peer_id) == "direct"

    def _permitted(self, addrs: Sequence[str]) -> list[str]:
        """Those of a peer's addresses that may be dialled in another round."""
        by_host = {parse_tcp(address)[1]: address for address in reversed(addrs)}
        hosts = list(dict.fromkeys(parse_tcp(address)[1] for address in addrs))[:MAX_HOSTS]
        return [by_host[host] for host in hosts if self._rounds.take(host, trio.current_time())]

    def _connect(self) -> HolePunch:
        addrs = [Multiaddr(address).to_bytes() for address in self._outside()[:MAX_ADDRS]]
        return HolePunch(type=HolePunch.CONNECT, ObsAddrs=addrs)


def _addresses(message: HolePunch) -> list[str]:
    """Plausible addresses where a peer says it can be met; none of a local network."""
    if message.type != HolePunch.CONNECT:
        raise ProtocolViolation("no CONNECT at the beginning of a punch")
    result: list[str] = []
    for encoded in message.ObsAddrs[:MAX_ADDRS]:
        try:
            protocol, ip, port, _ = parse_tcp(str(Multiaddr(encoded)))
        except (ValueError, BinaryParseError, ProtocolLookupError):
            continue
        if protocol in ("ip4", "ip6") and is_global(ip):
            result.append(f"/{protocol}/{ip}/tcp/{port}")
    return result
