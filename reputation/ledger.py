"""What is known of every peer: what we saw, what we were told, what was proved.

Theory of operation. What happens is applied to memory at once and noted as a change; `flush` hands the
changes to the store, which applies them to the file's records, and takes over what other processes wrote.
So recording never waits for a disk and may be done in an event loop, while `flush` belongs in a thread, and
several processes (a node, a client, the command line) keep one ledger. Changes that could not be written are
kept, and tried again with the next flush.

Two numbers come out. Integrity is the 5 % quantile of the Beta posterior of our own audits, to which what
others attest is added within caps (attestation.py); reliability the posterior mean over sessions. Bans rest
on own evidence alone: the user's word, the mean of our audits, or a fraud proof that this process checked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from p2pinfer.errors import LocalError

from . import account as accounts
from .account import NEWCOMER, Account, AuditResult
from .attestation import Attestation, Verify, attested_evidence, open_attestation, own_attestation, weight
from .config import LedgerConfig
from .explain import explain as explain_peer
from .proofs import ProofDecision, ProofNote, ProofState, decide
from .score import Score, audit_probability, score_of
from .store import FILE_NAME, Change, Changes, LedgerStore, open_store

if TYPE_CHECKING:
    from .verdict import Verdict

logger = logging.getLogger(__name__)

__all__ = ["Ledger", "LedgerConfig", "open_ledger"]

_MAX_UNWRITTEN = 100_000  # changes kept while the file cannot be written; beyond that the oldest go


class Ledger:
    """Every peer's record; a `ReputationView`. In memory, unless made by `Ledger.open`.

    Its time is that of the latest event it was told of, in seconds of any clock that only runs forward; a
    ledger that is kept needs the wall clock. Safe to use from several threads.

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
        self._accounts: dict[str, Account] = {}
        self._attestations: dict[str, Attestation] = {}
        self._proofs: dict[str, ProofNote] = {}
        self._attested: dict[str, tuple[float, float]] | None = {}  # None: to be reckoned anew
        self._changes = Changes()
        self._store: LedgerStore | None = None
        self._lock = threading.RLock()  # of all the above
        self._writing = threading.Lock()
        self._now = 0.0
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
        ledger._store = open_store(path, ledger.config)
        try:
            ledger._take_over()
        except BaseException:
            ledger._store.close()
            raise
        return ledger

    # ------------------------------------------------------------------ what it says

    def score(self, peer_id: str) -> Score:
        """The peer's score as of the ledger's time; a newcomer's integrity is the prior's 5 % quantile."""
        with self._lock:
            account = self._accounts.get(peer_id, NEWCOMER)
            return score_of(account, self.attested(peer_id), self._now, self.config)

    def is_banned(self, peer_id: str) -> bool:
        """Whether the peer must not be used: the user said so, its audits did, or a proof."""
        return self._accounts.get(peer_id, NEWCOMER).ban is not None

    def is_newcomer(self, peer_id: str) -> bool:
        """Whether the peer was audited too little to tell, and none of its audits failed."""
        return self._accounts.get(peer_id, NEWCOMER).is_newcomer(self.config)

    def audit_probability(self, peer_id: str, now: float) -> float:
        """With what probability to audit the peer's work in a session; see `score.audit_probability`."""
        self.advance(now)
        return audit_probability(self._accounts.get(peer_id, NEWCOMER), self.config)

    def account(self, peer_id: str) -> Account:
        """The peer's record; a stranger's is empty."""
        return self._accounts.get(peer_id, NEWCOMER)

    def peers(self) -> dict[str, Account]:
        """Every peer's record, the one met last at the end."""
        with self._lock:
            return dict(self._accounts)

    def explain(self, peer_id: str) -> list[str]:
        """Why the peer scores as it does, in plain words, one sentence a line."""
        with self._lock:
            return explain_peer(
                self.account(peer_id), self.score(peer_id), self.attested(peer_id), self.config
            )

    # ------------------------------------------------------------------ what it is told

    def record_success(self, peer_id: str, now: float) -> None:
        """The peer stayed until a session was done."""
        self._change(
            peer_id, partial(accounts.after_session, ok=True, now=now, why="", config=self.config), now
        )

    def record_failure(self, peer_id: str, now: float, why: str = "") -> None:
        """The peer refused, vanished, broke protocol, or sent no receipt or a broken one."""
        change = partial(accounts.after_session, ok=False, now=now, why=why, config=self.config)
        self._change(peer_id, change, now)

    def record_audit(
        self,
        peer_id: str,
        verdict: Verdict,
        now: float,
        *,
        confirmed: bool = True,
        withheld: bool = False,
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
            why: One sentence for people.
        """
        result: AuditResult = verdict.value
        if result == "fail" and not confirmed:
            result = "suspect"
        change: Change
        if result == "inconclusive" and withheld:
            change = partial(accounts.after_withholding, now=now, why=why, config=self.config)
        else:
            change = partial(accounts.after_audit, result=result, now=now, why=why, config=self.config)
        was_banned = self.is_banned(peer_id)
        self._change(peer_id, change, now)
        if self.is_banned(peer_id) and not was_banned:
            logger.warning("%s is banned: %s", peer_id, why or "its audits failed")

    def advance(self, now: float) -> None:
        """Let time pass without an event; the past counts less after it."""
        self._now = max(self._now, now)

    def ban(self, peer_id: str, why: str = "by the user", now: float | None = None) -> None:
        """Use the peer no more, whatever it did."""
        now = self._now if now is None else now
        self._change(peer_id, partial(accounts.banned, now=now, by="user", why=why), now)

    def forgive(self, peer_id: str, now: float | None = None) -> None:
        """Make the peer a newcomer: no ban, no evidence."""
        now = self._now if now is None else now
        self._change(peer_id, partial(accounts.forgiven, now=now), now)

    def vouch(self, peer_id: str, now: float | None = None) -> None:
        """Take the peer's integrity for granted."""
        now = self._now if now is None else now
        self._change(peer_id, partial(accounts.vouched_for, now=now), now)

    def merge(self, peer_id: str, record: Account, now: float) -> None:
        """Take in another record of the same peer, one of this user's other machines say."""
        self._change(peer_id, partial(accounts.merged, theirs=accounts.not_after(record, now)), now)

    def note_ranges(self, peer_id: str, ranges: Iterable[str], now: float) -> None:
        """A banned peer announces addresses of these ranges. Of one that is not banned nothing is kept."""
        account, known = self.account(peer_id), tuple(sorted(ranges))[: accounts.MAX_RANGES]
        if account.ban is not None and account.ranges != known:
            self._change(peer_id, partial(accounts.located, ranges=known), now)

    def spoilt_ranges(self, now: float) -> frozenset[str]:
        """Address ranges of peers that were banned not long ago: who is new there may be the same again."""
        since = now - self.config.spoilt_h * 3600
        with self._lock:
            return frozenset(
                each
                for account in self._accounts.values()
                if account.ban is not None and account.ban.at >= since
                for each in account.ranges
            )

    # ------------------------------------------------------------------ fraud proofs

    def weigh_proof(self, address: str, accused: str, sender: str, now: float) -> ProofDecision:
        """Whether a proof that `sender` tells of is worth fetching. Notes it as seen if it is.

        Args:
            address: The proof's content address.
        """
        with self._lock:
            decision = decide(
                address,
                accused,
                sender,
                now,
                proofs=self._proofs,
                accounts=self._accounts,
                config=self.config,
            )
            if decision is ProofDecision.FETCH:
                self._note_proof(address, ProofNote(accused, sender, "seen", now))
            return decision

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
        with self._lock:
            known = self._proofs.get(address)
            if known is not None and known.state != "seen":
                return
            state: ProofState = "verified" if verified else "false"
            self._note_proof(address, ProofNote(accused, sender, state, now))
            if sender:
                self._change(sender, partial(accounts.after_proof, verified=verified, now=now), now)
            if verified:
                reason = f"a fraud proof was checked and holds: {why or address}"
                if not self.is_banned(accused):
                    logger.warning("%s is banned: %s", accused, reason)
                self._change(accused, partial(accounts.banned, now=now, by="proof", why=reason), now)

    def proofs(self) -> dict[str, ProofNote]:
        """The proofs heard of, by content address."""
        with self._lock:
            return dict(self._proofs)

    # ------------------------------------------------------------------ attestations

    def attest(self, record: bytes, verify: Verify, now: float) -> float:
        """Take in another peer's signed opinions, and say what its word weighs at the moment, 0..1.

        Raises:
            ProtocolViolation: The record is malformed or not signed by its author.
        """
        attestation = open_attestation(record, verify, now)
        with self._lock:
            self.advance(now)
            known = self._attestations.get(attestation.author)
            if known is None or known.made_at < attestation.made_at:
                self._attestations.pop(attestation.author, None)
                self._attestations[attestation.author] = attestation
                self._changes.attestations[attestation.author] = attestation
                self._drop_attesters()
                self._attested = None
            return self.attester_weight(attestation.author)

    def attester_weight(self, author: str) -> float:
        """How much an author's word counts, 0..1; 0 for a banned one or without enough in common."""
        with self._lock:
            attestation = self._attestations.get(author)
            if attestation is None or self.is_banned(author):
                return 0.0
            return weight(attestation, self._accounts, self.config)

    def attested(self, peer_id: str) -> tuple[float, float]:
        """Good and bad audits that the peer is credited with on the word of others."""
        with self._lock:
            return self._heard().get(peer_id, (0.0, 0.0))

    def own_opinions(self, author: str, now: float) -> Attestation:
        """What `author`, which is us, may tell others: `attestation.seal_attestation` signs it."""
        with self._lock:
            return own_attestation(author, self._accounts, now)

    # ------------------------------------------------------------------ the file

    @property
    def is_dirty(self) -> bool:
        """Whether `flush` has something to write."""
        return self._store is not None and bool(self._changes)

    def flush(self) -> None:
        """Write what is new, and take over what other processes wrote. Takes milliseconds; use a thread.

        Raises:
            LocalError: It could not be written; it is kept in memory, and the next flush tries again.
        """
        with self._writing:
            if self._store is None:
                return
            with self._lock:
                changes, self._changes = self._changes, Changes()
            try:
                if changes:
                    written = self._store.write(changes)
                    with self._lock:
                        for peer_id, account in written.items():
                            self._replace(peer_id, account)
                self._take_over()
            except LocalError:
                with self._lock:
                    self._put_back(changes)
                raise

    def close(self) -> None:
        """Write what is new and close the file. Harmless twice, and without a file.

        Raises:
            LocalError: As `flush`; the file is closed all the same.
        """
        try:
            self.flush()
        finally:
            with self._writing:
                if self._store is not None:
                    self._store.close()
                    self._store = None

    def detach(self) -> None:
        """Write what is new, close the file, and go on in memory as if nobody had been met yet.

        Raises:
            LocalError: As `close`.
        """
        self.close()
        with self._lock:
            self._accounts.clear()
            self._attestations.clear()
            self._proofs.clear()
            self._changes = Changes()
            self._attested = {}

    # ------------------------------------------------------------------ inside

    def _change(self, peer_id: str, change: Change, now: float) -> None:
        with self._lock:
            self.advance(now)
            # Taken out and put back: the dict's order is that of the last event.
            account = change(self._accounts.pop(peer_id, NEWCOMER))
            self._accounts[peer_id] = account
            if self._store is not None:
                self._changes.accounts.append((peer_id, change))
            self._attested = None if self._attestations else {}
            if len(self._accounts) > self.config.max_peers:
                self._forget_one()

    def _forget_one(self) -> None:
        """Forget the longest unseen peer; who is banned or vouched for goes last."""
        for peer_id, account in self._accounts.items():
            if account.ban is None and not account.vouched:
                del self._accounts[peer_id]
                return
        del self._accounts[next(iter(self._accounts))]

    def _note_proof(self, address: str, note: ProofNote) -> None:
        self._proofs.pop(address, None)
        self._proofs[address] = note
        if self._store is not None:
            self._changes.proofs[address] = note
        if len(self._proofs) > self.config.max_proofs:
            del self._proofs[next(iter(self._proofs))]

    def _drop_attesters(self) -> None:
        """Drop the expired, and beyond the limit who weighs least, the longest unheard first."""
        oldest = self._now - self.config.attestation_ttl_s
        for author in [author for author, said in self._attestations.items() if said.made_at < oldest]:
            del self._attestations[author]
        if len(self._attestations) > self.config.max_attesters:
            del self._attestations[min(self._attestations, key=self.attester_weight)]

    def _heard(self) -> dict[str, tuple[float, float]]:
        if self._attested is None:
            believed = [said for author, said in self._attestations.items() if not self.is_banned(author)]
            self._attested = attested_evidence(believed, self._accounts, self.config)
        return self._attested

    def _take_over(self) -> None:
        """Make the file's records ours, with what came since applied to them again."""
        assert self._store is not None
        contents = self._store.read()
        if contents is None:
            return
        with self._lock:
            self._accounts = contents.accounts
            for peer_id, change in self._changes.accounts:
                self._accounts[peer_id] = change(self._accounts.pop(peer_id, NEWCOMER))
            self._attestations = {**contents.attestations, **self._changes.attestations}
            self._proofs = {**contents.proofs, **self._changes.proofs}
            self._attested = None
            self._now = max([self._now, *(each.as_of for each in self._accounts.values())])

    def _replace(self, peer_id: str, account: Account) -> None:
        """Put in what the file says now; what came meanwhile is applied to it again."""
        self._accounts.pop(peer_id, None)
        for other, change in self._changes.accounts:
            if other == peer_id:
                account = change(account)
        self._accounts[peer_id] = account
        self._attested = None

    def _put_back(self, changes: Changes) -> None:
        later = self._changes
        self._changes = Changes(
            [*changes.accounts, *later.accounts][-_MAX_UNWRITTEN:],
            {**changes.attestations, **later.attestations},
            {**changes.proofs, **later.proofs},
        )


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
