"""Quota of one client: a part of what others leave, and of what they only reserved.

Whoever is alone gets `share` of everything. The more others hold, the less one may hold, and something is
always left for who comes next: with a share of 3/4, one greedy client leaves a quarter, two come to 3/7 each
and leave a seventh. These are the dynamic thresholds of A. K. Choudhury and E. L. Hahne, "Dynamic queue
length thresholds for shared-memory packet switches" (1998): at most `share / (1 - share)` times what is free.

A session reserves room for its whole length, and may never use it. So a reservation is firm only as far as it
was earned: nothing before the first step, then twice as much as steps have filled. The rest stays with the
session while nobody else needs it, which is nearly always; then its pages follow each other. When somebody
does, it is taken back, from whoever has most of it, and a session that needs it again asks like anybody else.
Identities are free and addresses are not, so all clients of one address range have one client's part of what
is firm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from p2pinfer.errors import CacheFull
from p2pinfer.models.compute.cache import CacheLease, PagedCache
from p2pinfer.models.numerics import Codec
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence.prefixes import Prefix
from p2pinfer.node.protocol.messages import Open
from p2pinfer.node.protocol.replay_log import ReplayBudget, ReplayLog

from .lifetime import SessionRefusal

GROWTH: Final = 2  # times what was filled is firm: room for as much again
FIRST_TOKENS: Final = 256  # firm with the first step


def left_of_share(held: int, free: int, share: float) -> int:
    """Amount of the `free` that a client which holds `held` may still take."""
    return max(0, min(free, int(share * (held + free)) - held))


def exceeds_share(held: int, free: int, share: float) -> bool:
    """True if a client that holds `held` of something, of which `free` is left, holds more than its share."""
    return held > share * (held + free)


class Reservation(Protocol):
    """Part of a resource that one session holds."""

    @property
    def client(self) -> str:
        """Peer id of the client."""
        ...

    @property
    def address_range(self) -> str:
        """Addresses whose clients share one client's part."""
        ...

    @property
    def held(self) -> int:
        """Amount that nobody else has."""
        ...

    @property
    def earned(self) -> int:
        """Part of it that is firm."""
        ...

    def give_back(self) -> None:
        """Keep no more than is firm."""
        ...


class Quota:
    """Everybody's reservations of one resource."""

    def __init__(self, free: Callable[[], int], share: float) -> None:
        """`free` gives the amount that nobody holds."""
        self._free = free
        self._share = share
        self._reservations: dict[int, Reservation] = {}

    def add(self, reservation: Reservation) -> None:
        """Count a reservation from now on."""
        self._reservations[id(reservation)] = reservation

    def discard(self, reservation: Reservation) -> None:
        """Count it no more; what it holds is free as soon as its session has let go of it."""
        self._reservations.pop(id(reservation), None)

    def held_by(self, client: str) -> int:
        """Amount that a client has reserved."""
        return sum(each.held for each in self._reservations.values() if each.client == client)

    @property
    def lendable(self) -> int:
        """Amount that nobody holds, or holds firmly."""
        return self._free() + sum(each.held - _firm(each) for each in self._reservations.values())

    def left_for(self, client: str, address_range: str) -> int:
        """Amount that a client may reserve; what it has reserved itself counts as held, firm or not."""
        held, free = 0, self._free()
        for each in self._reservations.values():
            counted = each.held if each.client == client else _firm(each)
            free += each.held - counted
            held += counted if each.address_range == address_range else 0
        return left_of_share(held, free, self._share)

    def may_grow(self, reservation: Reservation, more: int) -> bool:
        """True if a session may have so much more than it holds, by what all have earned."""
        firm = sum(
            _firm(each)
            for each in self._reservations.values()
            if each.address_range == reservation.address_range and each is not reservation
        )
        spare = sum(
            each.held - _firm(each) for each in self._reservations.values() if each is not reservation
        )
        free = self._free() + spare
        held = firm + reservation.held
        return more <= free and not exceeds_share(held + more, free - more, self._share)

    def make_room(self, amount: int, client: str = "", but: Reservation | None = None) -> None:
        """Take back what is not firm until so much is free, or nothing more can be taken.

        Args:
            client: Whose own reservations stay as they are.
            but: Another one that does.
        """
        others = [
            each
            for each in self._reservations.values()
            if each is not but and each.client != (client or None)
        ]
        others.sort(key=lambda each: each.held - _firm(each))
        while others and self._free() < amount:
            others.pop().give_back()


def _firm(reservation: Reservation) -> int:
    return min(reservation.held, reservation.earned)


class CacheRoom:
    """Pages of the KV cache that one session holds, and those it may come to need.

    Attributes:
        filled: The highest position that a step was ever computed for; nothing below it is taken back. The
            session raises it with every step, after `grow` if that goes beyond the lease.
    """

    def __init__(
        self, quota: Quota, cache: PagedCache, lease: CacheLease, client: str, address_range: str
    ) -> None:
        self.client = client
        self.address_range = address_range
        self.lease = lease
        self._quota = quota
        self._cache = cache
        self._most = lease.max_tokens
        # A sixty-fourth of a small cache, so that many first steps do not fill it.
        self._first = min(FIRST_TOKENS, cache.capacity_tokens // 64)
        self.filled = lease.length

    @property
    def held(self) -> int:
        """Tokens that its pages have room for."""
        return self._cache.whole_pages(self.lease.max_tokens)

    @property
    def earned(self) -> int:
        """Tokens that stay with the session whoever else needs room."""
        return self._cache.whole_pages(self._firm(self.filled))

    def give_back(self) -> None:
        """Keep no more than is firm."""
        self.lease.resize(min(self.lease.max_tokens, self._firm(self.filled)))

    def grow(self, stop: int) -> None:
        """Have room again for a step up to position `stop`, which the lease has not.

        Raises:
            CacheFull: Others have earned the room that the session once reserved.
        """
        for wanted in (self._firm(stop), stop):
            more = self._cache.whole_pages(wanted) - self.held
            if self._quota.may_grow(self, more):
                self._quota.make_room(more, but=self)
                self.lease.resize(wanted)
                return
        raise CacheFull(
            f"the {self.lease.max_tokens} tokens of this session are used up, and other clients have filled "
            "the rest of the cache"
        )

    def _firm(self, filled: int) -> int:
        return min(self._most, max(self._first, GROWTH * filled)) if filled else 0


class ReplayRoom:
    """Bytes of the replay budget that one session holds, and those it may come to need."""

    def __init__(
        self, quota: Quota, log: ReplayLog, first_bytes: int, client: str, address_range: str
    ) -> None:
        self.client = client
        self.address_range = address_range
        self.log = log
        self._quota = quota
        self._most = log.reserved_bytes
        self._first = first_bytes
        log.on_full = self._grow

    @property
    def held(self) -> int:
        """Bytes that are reserved."""
        return self.log.reserved_bytes

    @property
    def earned(self) -> int:
        """Bytes that stay reserved whoever else needs them."""
        return self._firm(self.log.held_bytes)

    def give_back(self) -> None:
        """Keep no more than is firm."""
        self.log.resize(min(self.log.reserved_bytes, self.earned))

    def _grow(self, wanted: int) -> None:
        """Reserve for a log of `wanted` bytes, if that can be had; without, the log is given up."""
        for size in (self._firm(wanted), wanted):
            more = size - self.held
            if size <= self._most and self._quota.may_grow(self, more):
                self._quota.make_room(more, but=self)
                self.log.resize(size)
                return

    def _firm(self, filled: int) -> int:
        return min(self._most, max(self._first, GROWTH * filled)) if filled else 0


class Reservations:
    """Room in the cache and in the replay budget for the sessions of one span."""

    def __init__(self, cache: PagedCache, config: ServeConfig, row_bytes: Callable[[Codec], int]) -> None:
        """`row_bytes` gives the bytes that one token takes in the replay log."""
        self._cache = cache
        self._config = config
        self._row_bytes = row_bytes
        self._budget = ReplayBudget(config.replay_bytes)
        self._of_cache = Quota(lambda: cache.free_tokens, config.client_share)
        self._of_replay = Quota(lambda: self._budget.free_bytes, config.client_share)

    @property
    def free_tokens(self) -> int:
        """Tokens of the cache that no session holds, or holds without having earned them."""
        return self._of_cache.lendable

    @property
    def replay_bytes(self) -> int:
        """Bytes that are reserved for replay logs."""
        return self._budget.reserved_bytes

    def reserve(
        self, opening: Open, client: str, address_range: str, prefix: Prefix | None = None
    ) -> tuple[CacheRoom, ReplayRoom | None]:
        """Room for a session, to be added once there is one; None on the last hop, which replays to nobody.

        Args:
            prefix: What the session begins with. It holds those pages like all others.

        Raises:
            SessionRefusal: There is not so much, or not for this client.
        """
        room = self._reserve_cache(opening.max_tokens, client, address_range, prefix)
        if opening.successor is None:
            return room, None
        try:
            return room, self._reserve_replay(opening, client, address_range)
        except SessionRefusal:
            room.lease.release()
            raise

    def add(self, room: CacheRoom, replay: ReplayRoom | None) -> None:
        """Count the reservations of a session that was let in."""
        self._of_cache.add(room)
        if replay is not None:
            self._of_replay.add(replay)

    def discard(self, room: CacheRoom, replay: ReplayRoom | None) -> None:
        """Count the reservations of a session that ends no more."""
        self._of_cache.discard(room)
        if replay is not None:
            self._of_replay.discard(replay)

    def _reserve_cache(
        self, max_tokens: int, client: str, address_range: str, prefix: Prefix | None
    ) -> CacheRoom:
        cache, quota = self._cache, self._of_cache
        wanted, left = cache.whole_pages(max_tokens), quota.left_for(client, address_range)
        fits = left // cache.page_tokens * cache.page_tokens
        if left < wanted <= quota.lendable:
            raise SessionRefusal(
                "over_share",
                f"you hold {quota.held_by(client)} tokens of the cache, {cache.free_tokens} are free, and "
                f"{max_tokens} more would be over one client's share, or that of its address range; {fits} "
                "would not",
                fits=fits,
            )
        if wanted <= left:
            quota.make_room(wanted, client)
        try:
            if prefix is None:
                lease = cache.reserve(max_tokens)
            else:
                lease = cache.fork(prefix.pages, prefix.tokens, max_tokens)
        except CacheFull as exc:
            most = left_of_share(0, cache.capacity_tokens, self._config.client_share)
            never = f"; it could never have more than {most}" if max_tokens > most else ""
            raise SessionRefusal("cache_full", f"{exc}, one of {fits} would{never}", fits=fits) from exc
        return CacheRoom(quota, cache, lease, client, address_range)

    def _reserve_replay(self, opening: Open, client: str, address_range: str) -> ReplayRoom:
        quota, row = self._of_replay, self._row_bytes(opening.codec)
        size = min(opening.max_tokens * row, self._config.replay_bytes_per_session)
        left = quota.left_for(client, address_range)
        if left < size <= quota.lendable:
            problem = f"{size} more bytes of replay log would be over one client's share"
            raise SessionRefusal("over_share", problem, fits=left // row)
        if size <= left:
            quota.make_room(size, client)
        try:
            log = ReplayLog(self._budget, size)
        except CacheFull as exc:
            raise SessionRefusal("cache_full", str(exc), fits=left // row) from exc
        return ReplayRoom(quota, log, FIRST_TOKENS * row, client, address_range)
