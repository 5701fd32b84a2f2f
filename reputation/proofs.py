"""Bookkeeping of fraud proofs: which were heard of, fetched and checked, and whose are still accepted.

A proof is known by its content address. Checking one costs a re-execution, so a stranger could keep a node
busy with proofs of nothing: each sender is granted so many an hour, fewer the more of its proofs were false,
none once those outweigh the true ones; and all strangers together have one allowance, so that inventing
senders gains nothing, which shrinks as well when most of what they brought in the last hour was false.
Senders that proved something before have an allowance beside it, which a flood of strangers does not use up.
"""

from __future__ import annotations

from enum import Enum
from itertools import takewhile
from typing import Annotated, Literal, TypeAlias

import msgspec

from .account import NEWCOMER, Account
from .config import LedgerConfig

MAX_ADDRESS = 128  # characters of a content address
_REFUSED_BELOW = 0.3  # two false proofs with nothing to set against them
_HOUR_S = 3600.0

ProofState: TypeAlias = Literal["seen", "verified", "false"]


class ProofNote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fate of one proof."""

    accused: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,128}\Z")]
    sender: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{0,128}\Z")]  # empty: made here
    state: ProofState
    at: Annotated[float, msgspec.Meta(ge=0, le=1e11)]


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


def decide(
    address: str,
    accused: str,
    sender: str,
    now: float,
    *,
    proofs: dict[str, ProofNote],
    accounts: dict[str, Account],
    config: LedgerConfig,
) -> ProofDecision:
    """Decide if a proof is worth fetching. Bytes and time are spent only after FETCH."""
    known = proofs.get(address)
    if known is not None and known.state != "seen":
        return ProofDecision.KNOWN
    account = accounts.get(accused)
    if account is not None and account.ban is not None:
        return ProofDecision.NEEDLESS
    standing = sender_standing(accounts.get(sender, NEWCOMER))
    if standing < _REFUSED_BELOW:
        return ProofDecision.DISTRUSTED
    if known is not None and known.sender == sender and now - known.at < _HOUR_S:
        return ProofDecision.KNOWN  # it could not be had or checked; others may bring it
    heard = [note for note in _within_the_hour(proofs, now) if note.sender]
    recent = [note for note in heard if note.state != "verified"]
    if sum(note.sender == sender for note in recent) + 1 > max(1.0, standing * config.proofs_per_hour):
        return ProofDecision.TOO_MANY
    is_known = _has_proved(accounts, sender)
    alike = sum(_has_proved(accounts, note.sender) == is_known for note in recent)
    most = config.max_proofs_per_hour / 2 if is_known else _strangers_allowance(heard, config)
    if alike + 1 > most:
        return ProofDecision.TOO_MANY
    return ProofDecision.FETCH


def _strangers_allowance(heard: list[ProofNote], config: LedgerConfig) -> float:
    """Proofs an hour that all strangers may bring. Who proved something was a stranger until then."""
    true = 3 + sum(note.state == "verified" for note in heard)
    false = sum(note.state == "false" for note in heard)
    return max(config.least_proofs_per_hour, config.max_proofs_per_hour * true / (true + false))


def _within_the_hour(proofs: dict[str, ProofNote], now: float) -> list[ProofNote]:
    """The latest notes. They are kept in the order of their times, so the many old ones are not looked at."""
    return list(takewhile(lambda note: now - note.at < _HOUR_S, reversed(proofs.values())))


def _has_proved(accounts: dict[str, Account], sender: str) -> bool:
    return accounts.get(sender, NEWCOMER).proofs_verified > 0
