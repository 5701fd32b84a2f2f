"""Ledger of all peers: observations, attestations and fraud proofs.

Two numbers come out. Integrity is the 5 % quantile of the Beta posterior of our own audits, to which what
others attest is added within caps (attestation.py); reliability the posterior mean over sessions. Bans rest
on own evidence alone: the user's word, the mean of our audits, or a fraud proof that this process checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from p2pinfer.errors import LocalError

from . import account as accounts
from .account import Account, AuditResult
from .attestation import Attestation, Verify, open_attestation, own_attestation
from .config import LedgerConfig
from .explain import explain as explain_peer
from .proofs import ProofDecision, ProofGate
from .records import Records
from .score import Score, audit_probability, full_audit_probability, is_doubtful, score_of
from .small_lies import Sample
from .store import FILE_NAME, Change, ProofNote, ProofState, open_store

if TYPE_CHECKING:
    from .verdict import Verdict

logger = logging.getLogger(__name__)

__all__ = ["Ledger", "LedgerConfig", "open_ledger"]


class Ledger:
    """Every peer's record; a `ReputationView`. In memory, unless made by `Ledger.open`.

    Its time is that of the latest event it was told of, in seconds of any clock; a ledger that is kept needs
    the wall clock. Where that was ahead and is put right, the ledger is as well. Safe to use from several
    threads.

    Args:
        banned: Peers the user wants nothing to do with.
        vouched: Peers the user answers for, such as machines of their own.
    """

    def __init__(
        self,
        config: LedgerConfig | None = None,
        *,
        banned: Iterable[str] = (),
        vouched: Iterable[str] = (),
    ) -> None:
        self.config = config or LedgerConfig()
        self._records = Records(self.config)
        self._proofs = ProofGate(self._records, self.config)
        for peer_id in banned:
            self.ban(peer_id)
        for peer_id in vouched:
            self.vouch(peer_id)

    @classmethod
    def open(cls, path: Path, config: LedgerConfig | None = None) -> Ledger:
        """The ledger kept in the file `path`, made on first use; close it with `close`.

        A damaged file is moved aside and a fresh one begun, with a warning.

        Raises:
            LocalError: The file cannot be made, read or written, or is of a later version.
        """
        ledger = cls(config)
        ledger._records.attach(open_store(path, ledger.config))
        return ledger

    # ------------------------------------------------------------------ what it says

    def score(self, peer_id: str) -> Score:
        """The peer's score as of the ledger's time; a newcomer's integrity is the prior's 5 % quantile."""
        with self._records.lock:
            account = self.account(peer_id)
            return score_of(account, self.attested(peer_id), self._records.now, self.config)

    def is_banned(self, peer_id: str) -> bool:
        """True if the peer must not be used: the user said so, its audits did, or a proof."""
        return self.account(peer_id).ban is not None

    def is_newcomer(self, peer_id: str) -> bool:
        """True if the peer was audited too little to tell, and none of its audits failed."""
        return self.account(peer_id).is_newcomer(self.config)

    def audit_probability(self, peer_id: str, now: float) -> float:
        """Probability with which to audit the peer in a session; see `score.audit_probability`."""
        self.advance(now)
        return audit_probability(self.account(peer_id), self.config)

    def is_doubtful(self, peer_id: str) -> bool:
        """True if some audit said more against the peer than those of honest peers usually do."""
        return is_doubtful(self.account(peer_id))

    def full_audit_probability(self, peer_id: str) -> float:
        """Probability that an audit of the peer measures its outputs; see `score.full_audit_probability`."""
        return full_audit_probability(self.account(peer_id), self.config)

    def account(self, peer_id: str) -> Account:
        """The peer's record; a stranger's is empty."""
        return self._records.account(peer_id)

    def peers(self) -> dict[str, Account]:
        """Every peer's record, the one met last at the end."""
        with self._records.lock:
            return dict(self._records.accounts)

    def explain(self, peer_id: str) -> list[str]:
        """Explanation of the peer's scores in plain words, one sentence a line."""
        with self._records.lock:
            return explain_peer(
                self.account(peer_id), self.score(peer_id), self.attested(peer_id), self.config
            )

    # ------------------------------------------------------------------ what it is told

    def record_success(self, peer_id: str, now: float) -> None:
        """The peer stayed until a session was done."""
        self._records.change(
            peer_id, partial(accounts.after_session, ok=True, now=now, why="", config=self.config), now
        )

    def record_failure(self, peer_id: str, now: float, why: str = "", *, share: float = 1.0) -> None:
        """The peer refused, vanished, broke protocol, or sent no receipt or a broken one.

        Args:
            share: Of the fault, as far as it is known to be the peer's, 0..1: a half where one neighbour's
                word stands against the other's.
        """
        change = partial(accounts.after_session, ok=False, now=now, why=why, config=self.config, share=share)
        self._records.change(peer_id, change, now)

    def record_audit(
        self,
        peer_id: str,
        verdict: Verdict,
        now: float,
        *,
        confirmed: bool = True,
        withheld: bool = False,
        contradicted: bool = False,
        accused: bool = False,
        why: str = "",
    ) -> None:
        """An audit of the peer came out.

        Args:
            verdict: PASS and confirmed FAIL change integrity, SUSPECT only how often the peer is
                audited, INCONCLUSIVE nothing.
            confirmed: Whether a second, independent re-execution agrees with a FAIL; until then it counts as
                SUSPECT.
            withheld: It is INCONCLUSIVE because the peer did not hand out evidence that it had committed to:
                a failure of reliability.
            contradicted: It is SUSPECT since three other peers agree on another output: if that repeats, it
                costs integrity as well.
            accused: Somebody had published the contradicted output as a proof of fraud. Then it costs as much
                integrity as a confirmed FAIL, and bans nobody.
            why: One sentence for people.
        """
        result: AuditResult = verdict.value
        if result == "fail" and not confirmed:
            result = "suspect"
        change: Change
        if result == "inconclusive" and withheld:
            change = partial(accounts.after_withholding, now=now, why=why, config=self.config)
        else:
            change = partial(
                accounts.after_audit,
                result=result,
                now=now,
                why=why,
                config=self.config,
                contradicted=contradicted,
                accused=accused,
            )
        was_banned = self.is_banned(peer_id)
        self._records.change(peer_id, change, now)
        if self.is_banned(peer_id) and not was_banned:
            logger.warning("%s is banned: %s", peer_id, why or "its audits failed")

    def record_small_lies(self, peer_id: str, sample: Sample, now: float, *, is_short: bool = False) -> None:
        """An audit was measured: beside its verdict, what all audits of the peer come to together.

        Args:
            is_short: The session had too few tokens for a verdict of its own.
        """
        change = partial(
            accounts.after_small_lies, sample=sample, now=now, config=self.config, is_short=is_short
        )
        was_banned = self.is_banned(peer_id)
        self._records.change(peer_id, change, now)
        if self.is_banned(peer_id) and not was_banned:
            logger.warning("%s is banned: small deviations of many sessions add up", peer_id)

    def advance(self, now: float) -> None:
        """Let time pass without an event; the past counts less after it."""
        self._records.advance(now)

    def ban(
        self,
        peer_id: str,
        why: str = "by the user",
        now: float | None = None,
        by: Literal["user", "audits"] = "user",
    ) -> None:
        """Use the peer no more, whatever it did."""
        now = self._records.now if now is None else now
        self._records.change(peer_id, partial(accounts.banned, now=now, by=by, why=why), now)

    def forgive(self, peer_id: str, now: float | None = None) -> None:
        """Make the peer a newcomer: no ban, no evidence."""
        now = self._records.now if now is None else now
        self._records.change(peer_id, partial(accounts.forgiven, now=now), now)

    def vouch(self, peer_id: str, now: float | None = None) -> None:
        """Take the peer's integrity for granted."""
        now = self._records.now if now is None else now
        self._records.change(peer_id, partial(accounts.vouched_for, now=now), now)

    def merge(self, peer_id: str, record: Account, now: float) -> None:
        """Take in another record of the same peer, one of this user's other machines say."""
        self._records.change(peer_id, partial(accounts.merged, theirs=accounts.not_after(record, now)), now)

    def note_ranges(self, peer_id: str, ranges: Iterable[str], now: float) -> None:
        """A banned peer was found at addresses of these ranges. Of one that is not banned nothing is kept.

        Only ranges in which somebody has seen it count: anybody may announce any address.
        """
        account, known = self.account(peer_id), tuple(sorted(ranges))[: accounts.MAX_RANGES]
        if account.ban is not None and account.ranges != known:
            self._records.change(peer_id, partial(accounts.located, ranges=known), now)

    def spoilt_ranges(self, now: float) -> frozenset[str]:
        """Address ranges of peers that were banned not long ago: who is new there may be the same again."""
        with self._records.lock:
            self.advance(now)
            return self._records.roster.spoilt.since(now - self.config.spoilt_h * 3600)

    # ------------------------------------------------------------------ fraud proofs

    def weigh_proof(self, address: str, accused: str, sender: str, now: float) -> ProofDecision:
        """Decide if a proof that `sender` tells of is worth fetching, and note it as heard of if it is.

        Args:
            address: The proof's content address.
        """
        with self._records.lock:
            self.advance(now)
            decision = self._proofs.hear(address, accused, sender, now)
            if decision is ProofDecision.FETCH:
                self._records.note_heard(address, ProofNote(accused, sender, "seen", now))
            return decision

    def may_examine(self, address: str, accused: str, sender: str, now: float) -> bool:
        """True if a proof that is here may be run again; others may have been checked since it was told."""
        with self._records.lock:
            return self._proofs.weigh(address, accused, sender, now) is ProofDecision.FETCH

    def add_proof(
        self,
        address: str,
        accused: str,
        now: float,
        *,
        verified: bool,
        sender: str = "",
        why: str = "",
    ) -> None:
        """A fraud proof was re-executed here. A verified one bans the accused, a false one costs its sender.

        A proof that could not be checked is neither: leave it, and another sender may bring it again.

        Args:
            sender: Who sent it; empty if we made it ourselves.
        """
        with self._records.lock:
            known = self._records.proofs.get(address)
            if known is not None and known.state != "seen":
                return
            state: ProofState = "verified" if verified else "false"
            self._records.note_proof(address, ProofNote(accused, sender, state, now))
            if sender:
                useful = self.account(accused).is_met
                change = partial(accounts.after_proof, verified=verified, now=now, useful=useful)
                self._records.change(sender, change, now)
                if useful and verified:
                    self._proofs.found_useful(sender)
            if verified:
                reason = f"a fraud proof was checked and holds: {why or address}"
                if not self.is_banned(accused):
                    logger.warning("%s is banned: %s", accused, reason)
                self._records.change(accused, partial(accounts.banned, now=now, by="proof", why=reason), now)

    def proofs(self) -> dict[str, ProofNote]:
        """The proofs heard of, by content address."""
        with self._records.lock:
            return {**self._records.unchecked, **self._records.proofs}

    # ------------------------------------------------------------------ attestations

    def attest(self, record: bytes, verify: Verify, now: float) -> float:
        """Take in another peer's signed opinions, and say what its word weighs at the moment, 0..1.

        Raises:
            ProtocolViolation: The record is malformed or not signed by its author.
        """
        attestation = open_attestation(record, verify, now)
        self._records.note_attestation(attestation, now)
        return self.attester_weight(attestation.author)

    def attester_weight(self, author: str) -> float:
        """Weight of an author's word, 0..1; 0 for a banned one or without enough in common."""
        return self._records.attester_weight(author)

    def attested(self, peer_id: str) -> tuple[float, float]:
        """Good and bad audits that the peer is credited with on the word of others."""
        return self._records.attested(peer_id)

    def own_opinions(self, author: str, now: float) -> Attestation:
        """Opinions that `author`, which is us, may tell others: `attestation.seal_attestation` signs them."""
        with self._records.lock:
            return own_attestation(author, self._records.accounts, now)

    # ------------------------------------------------------------------ the file

    @property
    def is_dirty(self) -> bool:
        """True if `flush` has something to write."""
        return self._records.is_dirty

    def flush(self) -> None:
        """Write what is new, and take over what other processes wrote. Takes milliseconds; use a thread.

        Raises:
            LocalError: It could not be written; it is kept in memory, and the next flush tries again.
        """
        self._records.flush()

    def close(self) -> None:
        """Write what is new and close the file. Harmless twice, and without a file.

        Raises:
            LocalError: As `flush`; the file is closed all the same.
        """
        self._records.close()

    def detach(self) -> None:
        """Write what is new, close the file, and go on in memory as if nobody had been met yet.

        Raises:
            LocalError: As `close`.
        """
        self._records.detach()


def open_ledger(
    data_dir: Path,
    config: LedgerConfig | None = None,
    warn: Callable[[str], None] = logger.warning,
) -> Ledger:
    """The ledger of a data directory; one in memory, and a warning, where none can be kept.

    What a generation needs of a ledger is there either way, so a full disk does not stop it.
    """
    try:
        return Ledger.open(data_dir / FILE_NAME, config)
    except LocalError as exc:
        warn(f"{exc}; what is learnt about peers will be forgotten")
        return Ledger(config)
