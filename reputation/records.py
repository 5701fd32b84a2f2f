"""Records of all peers in memory, merged with a file that other processes write to as well.

Theory of operation. What happens is applied to memory at once and noted as a change; `flush` hands the
changes to the store, which applies them to the file's records, and takes over what other processes wrote.
So recording never waits for a disk and may be done in an event loop, while `flush` belongs in a thread, and
several processes (a node, a client, the command line) keep one ledger. Changes that could not be written are
kept, and tried again with the next flush.

Others read while an event is noted, and some without the lock: a peer's record is replaced, never taken out
and put back, since in between one that is banned would be a stranger.

Memory is bounded: beyond the limits of `LedgerConfig` the longest unseen peer goes, the oldest proof, and who
weighs least of those that attest.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from p2pinfer.errors import LocalError

from .account import NEWCOMER, Account
from .attestation import Attestation, attested_evidence, weight
from .config import LedgerConfig
from .proofs import ProofNote
from .store import Change, Changes, LedgerStore

_MAX_UNWRITTEN: Final = 100_000  # changes kept while the file cannot be written; beyond that the oldest go


class Records:
    """Accounts, attestations and notes of proofs. Hold `lock` to read several things as of one moment.

    Attributes:
        accounts: By peer id, the one met last at the end. One of them may be read without the lock.
        attestations: The latest of each author.
        proofs: By content address.
        now: The latest time that anything was told of.
    """

    def __init__(self, config: LedgerConfig) -> None:
        self.accounts: OrderedDict[str, Account] = OrderedDict()
        self.attestations: dict[str, Attestation] = {}
        self.proofs: dict[str, ProofNote] = {}
        self.now = 0.0
        self.lock = threading.RLock()  # of all in this class but `_writing`
        self._config = config
        self._attested: dict[str, tuple[float, float]] | None = {}  # None: to be reckoned anew
        self._changes = Changes()
        self._store: LedgerStore | None = None
        self._writing = threading.Lock()

    def attach(self, store: LedgerStore) -> None:
        """Go on from what `store` has, and keep there what comes; it is closed with this.

        Raises:
            LocalError: It cannot be read; it is closed.
        """
        self._store = store
        try:
            self._take_over()
        except BaseException:
            store.close()
            raise

    # ------------------------------------------------------------------ what they say

    def account(self, peer_id: str) -> Account:
        """The peer's record; a stranger's is empty."""
        return self.accounts.get(peer_id, NEWCOMER)

    def attested(self, peer_id: str) -> tuple[float, float]:
        """Good and bad audits that the peer is credited with on the word of others."""
        with self.lock:
            if self._attested is None:
                believed = [
                    said for author, said in self.attestations.items() if self.account(author).ban is None
                ]
                self._attested = attested_evidence(believed, self.accounts, self._config)
            return self._attested.get(peer_id, (0.0, 0.0))

    def attester_weight(self, author: str) -> float:
        """Weight of an author's word, 0..1; 0 for a banned one or without enough in common."""
        with self.lock:
            attestation = self.attestations.get(author)
            if attestation is None or self.account(author).ban is not None:
                return 0.0
            return weight(attestation, self.accounts, self._config)

    # ------------------------------------------------------------------ what changes them

    def advance(self, now: float) -> None:
        """Let time pass."""
        self.now = max(self.now, now)

    def change(self, peer_id: str, change: Change, now: float) -> None:
        """Something happened to do with the peer."""
        with self.lock:
            self.advance(now)
            _put_last(self.accounts, peer_id, change(self.account(peer_id)))
            if self._store is not None:
                self._changes.accounts.append((peer_id, change))
            self._attested = None if self.attestations else {}
            if len(self.accounts) > self._config.max_peers:
                self._forget_one()

    def note_proof(self, address: str, note: ProofNote) -> None:
        """Something became of a proof."""
        with self.lock:
            self.proofs.pop(address, None)
            self.proofs[address] = note
            if self._store is not None:
                self._changes.proofs[address] = note
            if len(self.proofs) > self._config.max_proofs:
                del self.proofs[next(iter(self.proofs))]

    def note_attestation(self, attestation: Attestation, now: float) -> None:
        """An author said something. What it said earlier counts no more, in whatever order the two come."""
        with self.lock:
            self.advance(now)
            known = self.attestations.get(attestation.author)
            if known is not None and known.made_at >= attestation.made_at:
                return
            self.attestations.pop(attestation.author, None)
            self.attestations[attestation.author] = attestation
            if self._store is not None:
                self._changes.attestations[attestation.author] = attestation
            self._drop_attesters()
            self._attested = None

    # ------------------------------------------------------------------ the file

    @property
    def is_dirty(self) -> bool:
        """True if `flush` has something to write."""
        return self._store is not None and bool(self._changes)

    def flush(self) -> None:
        """Write what is new, and take over what other processes wrote. Takes milliseconds; use a thread.

        Raises:
            LocalError: It could not be written; it is kept in memory, and the next flush tries again.
        """
        with self._writing:
            if self._store is None:
                return
            with self.lock:
                changes, self._changes = self._changes, Changes()
            try:
                if changes:
                    written = self._store.write(changes)
                    with self.lock:
                        for peer_id, account in written.items():
                            self._replace(peer_id, account)
                self._take_over()
            except LocalError:
                with self.lock:
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
        with self.lock:
            self.accounts.clear()
            self.attestations.clear()
            self.proofs.clear()
            self._changes = Changes()
            self._attested = {}

    # ------------------------------------------------------------------ inside

    def _forget_one(self) -> None:
        """Forget the longest unseen peer; who is banned or vouched for goes last."""
        for peer_id, account in self.accounts.items():
            if account.ban is None and not account.vouched:
                del self.accounts[peer_id]
                return
        del self.accounts[next(iter(self.accounts))]

    def _drop_attesters(self) -> None:
        """Drop the expired, and beyond the limit who weighs least, the longest unheard first."""
        oldest = self.now - self._config.attestation_ttl_s
        for author in [author for author, said in self.attestations.items() if said.made_at < oldest]:
            del self.attestations[author]
        if len(self.attestations) > self._config.max_attesters:
            del self.attestations[min(self.attestations, key=self.attester_weight)]

    def _take_over(self) -> None:
        """Make the file's records ours, with what came since applied to them again."""
        assert self._store is not None
        contents = self._store.read()
        if contents is None:
            return
        accounts = OrderedDict(contents.accounts)
        with self.lock:
            for peer_id, change in self._changes.accounts:
                _put_last(accounts, peer_id, change(accounts.get(peer_id, NEWCOMER)))
            self.accounts = accounts
            self.attestations = {**contents.attestations, **self._changes.attestations}
            self.proofs = {**contents.proofs, **self._changes.proofs}
            self._attested = None
            self.now = max([self.now, *(each.as_of for each in self.accounts.values())])

    def _replace(self, peer_id: str, account: Account) -> None:
        """Put in what the file says now; what came meanwhile is applied to it again."""
        for other, change in self._changes.accounts:
            if other == peer_id:
                account = change(account)
        _put_last(self.accounts, peer_id, account)
        self._attested = None

    def _put_back(self, changes: Changes) -> None:
        later = self._changes
        self._changes = Changes(
            [*changes.accounts, *later.accounts][-_MAX_UNWRITTEN:],
            {**changes.attestations, **later.attestations},
            {**changes.proofs, **later.proofs},
        )


def _put_last(accounts: OrderedDict[str, Account], peer_id: str, account: Account) -> None:
    accounts[peer_id] = account
    accounts.move_to_end(peer_id)
