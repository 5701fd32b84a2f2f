"""Gate of fraud proofs: which were heard of and checked, and whose are still accepted.

A proof is known by its content address. Checking one costs a re-execution, so a stranger could keep a node
busy. Each sender is granted so many an hour, fewer the more of its proofs were false, none once those
outweigh the true ones. All strangers together have one allowance, so that inventing senders gains nothing; it
shrinks when most of what they brought in the last hour was false.

What counts against it are proofs that were checked, not those that were only told of: a notice of nothing
costs a question to a neighbour, and locks nobody out. A true proof counts as well if it is about a peer that
nobody here has met: keys are free, and so are lies to oneself. Proofs about peers that were met have an
allowance beside that one, and so have senders whose proofs were of use. A flood uses up neither.
"""

from __future__ import annotations

from enum import Enum
from itertools import takewhile
from typing import TYPE_CHECKING, Final

from p2pinfer.recent import Recent

from .account import Account
from .config import LedgerConfig
from .store import ProofNote

if TYPE_CHECKING:
    from .records import Records

MAX_ADDRESS = 128  # characters of a content address
_REFUSED_BELOW = 0.3  # two false proofs with nothing to set against them
_HOUR_S = 3600.0
_MAX_SENDERS: Final = 4096  # whose allowance is remembered; of those it grants nothing to, the flood is short


class ProofDecision(Enum):
    """Decision about a proof that somebody tells of."""

    FETCH = "fetch it and check it"
    KNOWN = "it was checked before"
    NEEDLESS = "the accused is banned already"
    TOO_MANY = "its sender, or everybody together, sent too many this hour"
    DISTRUSTED = "its sender sent false ones"


def sender_standing(sender: Account) -> float:
    """Standing of a sender of proofs, 0..1; 1 for one that never sent any."""
    true = 1 + sender.proofs_verified
    return true / (true + 2 * sender.proofs_false)


class ProofGate:
    """Decides which proofs are worth a fetch, and which of those a re-execution.

    Args:
        records: Of which it reads accounts and notes. Whoever calls holds their lock.
    """

    def __init__(self, records: Records, config: LedgerConfig) -> None:
        self._records = records
        self._config = config
        self._told = Recent[str, tuple[float, float]](
            _MAX_SENDERS
        )  # by sender: what counts of it, since when

    def hear(self, address: str, accused: str, sender: str, now: float) -> ProofDecision:
        """Decide about a proof that `sender` tells of; what is to be fetched counts against its allowance."""
        heard = self._records.unchecked.get(address)
        decision = self.weigh(address, accused, sender, now)
        if decision is not ProofDecision.FETCH:
            return decision
        if heard is not None and heard.sender == sender and 0 <= now - heard.at < _HOUR_S:
            return ProofDecision.KNOWN  # it could not be had or checked; others may bring it
        most = max(1.0, sender_standing(self._records.account(sender)) * self._config.proofs_per_hour)
        told, since = self._told.get(sender, (0.0, now))
        told = max(0.0, told - max(0.0, now - since) * most / _HOUR_S)
        if told + 1 > most:
            return ProofDecision.TOO_MANY
        self._told[sender] = told + 1, now
        return decision

    def weigh(self, address: str, accused: str, sender: str, now: float) -> ProofDecision:
        """Decide about a proof, whoever told of it how often. Bytes and time are spent only after FETCH."""
        known, account = self._records.proofs.get(address), self._records.account(accused)
        if known is not None and known.state != "seen":
            return ProofDecision.KNOWN
        if account.ban is not None:
            return ProofDecision.NEEDLESS
        if sender_standing(self._records.account(sender)) < _REFUSED_BELOW:
            return ProofDecision.DISTRUSTED
        if not account.is_met and not self._records.roster.has_room_for_told(now):
            return ProofDecision.TOO_MANY
        checked = [note for note in self._within_the_hour(now) if note.sender]
        is_useful = self._is_useful(sender)
        alike = sum(
            self._counts(note, account.is_met) and self._is_useful(note.sender) == is_useful
            for note in checked
        )
        most = self._config.max_proofs_per_hour / 2 if is_useful else self._strangers_allowance(checked)
        return ProofDecision.FETCH if alike + 1 <= most else ProofDecision.TOO_MANY

    def found_useful(self, sender: str) -> None:
        """Take back what a proof counted for that was true, and about somebody who was met here."""
        if sender in self._told:
            told, since = self._told[sender]
            self._told[sender] = max(0.0, told - 1), since

    def _counts(self, note: ProofNote, about_met: bool) -> bool:
        """True if a proof that was checked used up some of the allowance for proofs of its kind."""
        is_met = self._records.account(note.accused).is_met
        return is_met == about_met and (note.state == "false" or not is_met)

    def _is_useful(self, sender: str) -> bool:
        return self._records.account(sender).proofs_useful > 0

    def _strangers_allowance(self, checked: list[ProofNote]) -> float:
        """Proofs an hour that all strangers may bring. Who proved something was a stranger until then."""
        config = self._config
        true = 3 + sum(note.state == "verified" for note in checked)
        false = sum(note.state == "false" for note in checked)
        return max(config.least_proofs_per_hour, config.max_proofs_per_hour * true / (true + false))

    def _within_the_hour(self, now: float) -> list[ProofNote]:
        """The latest notes. They are in the order of their times, so the many old ones are not looked at.

        A time that lies ahead is a wrong clock's, and says nothing.
        """
        latest = takewhile(lambda note: now - note.at < _HOUR_S, reversed(self._records.proofs.values()))
        return [note for note in latest if note.at <= now]
