"""Dials of addresses that are hearsay: where they may lead, how many at a time, and how often.

Anybody may sign an announcement that names your mail server, and have every peer that hears of it knock
there. So an address at which a peer has not proved its key yet is dialled only

- if it is in a network of ours, or the same for everybody (`home_networks`);
- one of a few of that peer's;
- one dial at a time for each IP address, and after each one in vain twice as late as after the one before;
- a few at a time for each address range, for each peer that told us of such peers, and in all.

A dial that finds the peer costs nothing, and takes back what was held against the address. So an honest peer
meets a limit only behind an address where others were not found a moment ago.

Many peers may share one machine, or one house. So in a private range where this host or a peer of it was met,
a port counts as an address, more of them are dialled at once, and a port that is closed costs nothing: nobody
is disturbed. Where somebody accepts who is no peer, later tries share a small budget.

What our operator names, and what the local network's own multicast tells, is no hearsay.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, cast

import trio

from p2pinfer.errors import NotDialled
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.transport.addresses import is_circuit, line_of, parse_tcp, range_of
from p2pinfer.recent import Recent

from .home_networks import HomeNetworks, is_loopback, plain, resolve

MAX_DIRECT: Final = 4  # addresses of one peer that are dialled
MAX_CIRCUITS: Final = 4  # ways through relays to one peer that are tried
FIRST_PAUSE_S: Final = 3.0  # before an IP address is dialled again where a peer was not found
LAST_PAUSE_S: Final = 3600.0
SLOW_S: Final = 1.0  # a dial given up sooner than this was not in vain: another address was quicker
RANGE_PER_S: Final = 0.1  # dials in vain into one address range, on average
RANGE_AT_ONCE: Final = 4
HOME_PER_S: Final = 0.2  # into a private range in which peers were met
HOME_AT_ONCE: Final = 96  # of its ports, each for the first time
HOME_AGAIN_PER_S: Final = 0.1  # and again
HOME_AGAIN_AT_ONCE: Final = 4
MAX_HOMES: Final = 256  # such ranges that are remembered
TELLER_PER_S: Final = 16.0  # of peers that one neighbour told us of first
TELLER_AT_ONCE: Final = 128
ALL_PER_S: Final = 32.0
ALL_AT_ONCE: Final = 256
MAX_REMEMBERED: Final = 8192
FORGIVEN: Final = 3  # dials in vain of a proved address before it is hearsay again


@dataclass(slots=True)
class _Place:
    """State of a line, or of a port at home."""

    turn: trio.Lock = field(default_factory=trio.Lock)
    in_vain: int = 0  # dials since the last that found its peer
    retry_at: float = float("-inf")


class StrangerDials:
    """Limits of one host's dials. `teller` gives who told us of a peer first; empty: nobody."""

    def __init__(
        self, homes: HomeNetworks | None = None, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self.homes = homes or HomeNetworks(clock=clock)
        self.teller: Callable[[str], str] = lambda peer_id: ""
        self._clock = clock
        self._places = Recent[str, _Place](MAX_REMEMBERED)
        # (peer id, IP address, port) where the peer proved its key: dials in vain since
        self._proved = Recent[tuple[str, str, int], int](MAX_REMEMBERED)
        self._ranges = RateLimit(RANGE_PER_S, RANGE_AT_ONCE)
        self._home_ranges = RateLimit(HOME_PER_S, HOME_AT_ONCE)
        self._home_again = RateLimit(HOME_AGAIN_PER_S, HOME_AGAIN_AT_ONCE)
        self._homes_met = Recent[str, None](MAX_HOMES)  # private ranges in which a peer was met
        self._tellers = RateLimit(TELLER_PER_S, TELLER_AT_ONCE)
        self._all = RateLimit(ALL_PER_S, ALL_AT_ONCE)

    def note_seen(self, remote: tuple[str, int] | None) -> None:
        """A peer proved its key over a connection with this IP address and port at its other end."""
        if remote is not None:
            self.homes.note_met(remote[0])
            self._note_home(remote[0])

    def note_own(self, addrs: Iterable[str]) -> None:
        """This host is reached at these multiaddrs."""
        for protocol, host, *_ in map(parse_tcp, addrs):
            if is_loopback(host):
                self.homes.has_loopback = True
            if protocol in ("ip4", "ip6"):
                self._note_home(host)

    def is_proved(self, peer_id: str, ip: str, port: int) -> bool:
        """True if the peer was found there."""
        return (peer_id, ip, port) in self._proved

    def choose(self, peer_id: str, addrs: Iterable[str]) -> tuple[list[str], dict[str, Exception]]:
        """The addresses of a peer that may be dialled, in their order, and why others may not."""
        chosen: list[str] = []
        refused: dict[str, Exception] = {}
        left = {False: MAX_DIRECT, True: MAX_CIRCUITS}
        for address in addrs:
            through_relay = is_circuit(address)
            try:
                if not through_relay:
                    protocol, ip, port, _ = parse_tcp(address)
                    if self.is_proved(peer_id, ip, port):
                        chosen.append(address)
                        continue
                    if protocol in ("ip4", "ip6"):
                        self._check_home(peer_id, ip)
                if left[through_relay] == 0:
                    raise NotDialled("not tried: it announces too many addresses", peer_id)
            except (ValueError, NotDialled) as exc:
                refused[address] = exc
                continue
            left[through_relay] -= 1
            chosen.append(address)
        return chosen, refused

    def check_late(self, peer_id: str, address: str, late: list[str]) -> None:
        """Count an address that became known during a dial among those that are `late`.

        Raises:
            NotDialled, ValueError: It may not be dialled, or there were enough.
        """
        _, refused = self.choose(peer_id, [address])
        if address in refused:
            raise refused[address]
        if len(late) >= MAX_DIRECT:
            raise NotDialled("not tried: it announces too many addresses", peer_id)
        late.append(address)

    async def dial(
        self, peer_id: str, address: str, dial_tcp: Callable[[str], Awaitable[None]], *, hearsay: bool
    ) -> None:
        """Have `address`, a multiaddr of TCP, dialled by `dial_tcp` if it may be.

        Raises:
            NotDialled: It may not be dialled at the moment.
            Exception: Whatever `dial_tcp` raises; OSError for a name that is none.
        """
        protocol, host, port, _ = parse_tcp(address)
        if not hearsay:
            self.homes.note_site("127.0.0.1" if is_loopback(host) else host)
            await dial_tcp(f"/{protocol}/{host}/tcp/{port}")
            if protocol in ("ip4", "ip6"):
                self._proved[peer_id, host, port] = 0
            return
        ip = await resolve(protocol, host, port)
        async with self.dialling(peer_id, ip, port):
            await dial_tcp(f"/{'ip6' if ':' in ip else 'ip4'}/{ip}/tcp/{port}")

    @asynccontextmanager
    async def dialling(self, peer_id: str, ip: str, port: int) -> AsyncGenerator[None]:
        """Around one dial, which finds the peer if the block ends without an error.

        Raises:
            NotDialled: It may not be dialled at the moment; or what the block raises.
        """
        key = (peer_id, ip, port)
        if key in self._proved:
            try:
                yield
            except BaseException:
                self._note_lost(key)
                raise
            self._proved[key] = 0
            return
        self._check_home(peer_id, ip)
        place = self._place(ip, port)
        async with place.turn:
            budgets = self._take(peer_id, ip, place)
            began_at = self._clock()
            try:
                yield
            except BaseException as exc:
                if isinstance(exc, Exception) or self._clock() >= began_at + SLOW_S:
                    self._note_in_vain(place)
                    if self._is_home(ip) and _is_refusal(exc):
                        self._give_back(budgets[-1:])  # nobody is there who could be disturbed
                else:
                    self._give_back(budgets)
                raise
            self._give_back(budgets)
            place.in_vain, place.retry_at = 0, float("-inf")
            self._proved[key] = 0
            self._note_home(ip)

    def _note_home(self, ip: str) -> None:
        address = plain(ip)
        if address is not None and not address.is_global:
            self._homes_met[range_of(str(address))] = None

    def _is_home(self, ip: str) -> bool:
        """True in a private range where a peer was met: there, many ports of one machine may be peers."""
        return range_of(_plain_text(ip)) in self._homes_met

    def _check_home(self, peer_id: str, ip: str) -> None:
        if not self.homes.has(ip):
            raise NotDialled("not dialled: this host is not in that network", peer_id)

    def _place(self, ip: str, port: int) -> _Place:
        name = f"{ip} {port}" if self._is_home(ip) else line_of(_plain_text(ip))
        place = self._places.get(name) or _Place()
        self._places[name] = place
        return place

    def _take(self, peer_id: str, ip: str, place: _Place) -> list[tuple[RateLimit, str]]:
        """Take what one dial costs; NotDialled, with nothing taken, if that is not there."""
        now = self._clock()
        if now < place.retry_at:
            wait_s = place.retry_at - now
            raise NotDialled(
                f"not dialled: nobody of the name was found there; again in {wait_s:.0f} s", peer_id
            )
        limit = self._ranges
        if self._is_home(ip):
            limit = self._home_again if place.in_vain else self._home_ranges
        budgets = [
            (self._all, ""),
            (self._tellers, self.teller(peer_id)),
            (limit, range_of(_plain_text(ip))),
        ]
        taken: list[tuple[RateLimit, str]] = []
        for limit, name in budgets:
            if not limit.take(name, now):
                self._give_back(taken)
                raise NotDialled(
                    "not dialled: too many strangers were not found lately", peer_id, is_passing=True
                )
            taken.append((limit, name))
        return taken

    def _give_back(self, budgets: Iterable[tuple[RateLimit, str]]) -> None:
        for limit, name in budgets:
            limit.give_back(name)

    def _note_in_vain(self, place: _Place) -> None:
        pause_s = min(FIRST_PAUSE_S * 2 ** min(place.in_vain, 32), LAST_PAUSE_S)
        place.in_vain += 1
        place.retry_at = self._clock() + pause_s

    def _note_lost(self, key: tuple[str, str, int]) -> None:
        """After a few dials in vain somebody else may have the address."""
        if self._proved[key] + 1 < FORGIVEN:
            self._proved[key] += 1
        else:
            del self._proved[key]


def _is_refusal(exc: BaseException) -> bool:
    """True if the port was closed, which libp2p and trio wrap up several times."""
    if exc.__cause__ is not None:
        return _is_refusal(exc.__cause__)
    if isinstance(exc, BaseExceptionGroup):
        return all(map(_is_refusal, cast("BaseExceptionGroup[BaseException]", exc).exceptions))
    return isinstance(exc, ConnectionRefusedError)


def _plain_text(ip: str) -> str:
    return str(plain(ip) or ip)
