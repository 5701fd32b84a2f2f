"""Roster of accounts: who keeps a place when there are more peers than are remembered.

Identities cost nothing, so whoever tells of enough peers could fill any table. Therefore accounts have ranks,
each with room of its own, and none takes a place of another one:

    met      own sessions and audits, the user's word     the longest unseen goes, a ban and a voucher last
    told     banned on a proof, and never met here        nobody goes for a younger one, unless it is old
    sender   nothing but proofs that it sent              the longest unheard goes

So what strangers say costs nobody an observation of our own, and no flood of true proofs about peers that
nobody has met lifts an earlier ban.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum
from itertools import takewhile
from typing import Final

from .account import NEWCOMER, Account
from .config import LedgerConfig
from .spoilt_ranges import SpoiltRanges

CLOCK_SLACK_S: Final = 300.0  # how far a time may lie ahead before the clock that gave it counts as wrong


class Rank(Enum):
    """Reason for which an account is kept."""

    MET = "observed here"
    KEPT = "the same, and banned or vouched for"
    TOLD = "banned on a proof, and never met"
    SENDER = "known by the proofs that it sent"


def rank_of(account: Account) -> Rank:
    """The rank of an account."""
    ban = account.ban
    if account.is_met:
        return Rank.MET if ban is None and not account.vouched else Rank.KEPT
    return Rank.SENDER if ban is None else Rank.TOLD


class Roster:
    """Accounts by peer id, within the bounds of a `LedgerConfig`.

    Attributes:
        accounts: The one that something happened to last is at the end. One may be read without a lock: it is
            replaced, never taken out and put back.
    """

    def __init__(self, config: LedgerConfig, accounts: Iterable[tuple[str, Account]] = ()) -> None:
        """A roster of `accounts`, the one met last at the end."""
        self.accounts: OrderedDict[str, Account] = OrderedDict()
        self.spoilt = SpoiltRanges()
        self._config = config
        self._orders = {rank: OrderedDict[str, None]() for rank in Rank}
        self._dropped: dict[str, float] = {}  # who lost a place, and the latest time known of it
        for peer_id, account in accounts:
            self.put(peer_id, account)

    def get(self, peer_id: str) -> Account:
        """The peer's account; a stranger's is empty."""
        return self.accounts.get(peer_id, NEWCOMER)

    def put(self, peer_id: str, account: Account) -> None:
        """Something happened to a peer; whoever loses a place for it is told by `take_dropped`."""
        rank, before = rank_of(account), self.accounts.get(peer_id)
        if before is not None and (former := rank_of(before)) is not rank:
            del self._orders[former][peer_id]
        order = self._orders[rank]
        order[peer_id] = None
        if rank is not Rank.TOLD:  # they are in the order of their bans
            order.move_to_end(peer_id)
        self.accounts[peer_id] = account
        self.accounts.move_to_end(peer_id)
        self.spoilt.put(peer_id, account)
        self._dropped.pop(peer_id, None)
        self._make_room()

    def take_dropped(self) -> dict[str, float]:
        """Peers that lost their place since this was asked last, each with the latest time known of it."""
        dropped, self._dropped = self._dropped, {}
        return dropped

    def has_room_for_told(self, now: float) -> bool:
        """True if one more peer that was never met here may be banned on others' word."""
        told = self._orders[Rank.TOLD]
        return len(told) < self._config.max_told_bans or self._is_old(next(iter(told)), now)

    def ahead_of(self, now: float) -> list[str]:
        """Peers with times that only a wrong clock can have given.

        What a clock gave that was ahead is at the end of its order, so no others are looked at.
        """
        latest = now + CLOCK_SLACK_S
        return [
            peer_id
            for order in self._orders.values()
            for peer_id in takewhile(lambda each: self.accounts[each].latest > latest, reversed(order))
        ]

    def _make_room(self) -> None:
        config, orders = self._config, self._orders
        met, kept = orders[Rank.MET], orders[Rank.KEPT]
        while len(met) + len(kept) > config.max_peers:
            self._drop(next(iter(met or kept)))
        while len(orders[Rank.SENDER]) > config.max_senders:
            self._drop(next(iter(orders[Rank.SENDER])))
        told = orders[Rank.TOLD]
        while len(told) > config.max_told_bans:
            newest = next(reversed(told))
            oldest = next(iter(told))
            self._drop(oldest if self._is_old(oldest, self.accounts[newest].latest) else newest)

    def _is_old(self, peer_id: str, now: float) -> bool:
        ban = self.accounts[peer_id].ban
        return ban is not None and ban.at < now - self._config.told_ban_h * 3600

    def _drop(self, peer_id: str) -> None:
        account = self.accounts.pop(peer_id)
        del self._orders[rank_of(account)][peer_id]
        self.spoilt.drop(peer_id)
        self._dropped[peer_id] = account.latest
