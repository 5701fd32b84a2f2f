"""Records of all peers in memory, merged with a file that other processes write to as well.

Theory of operation. What happens is applied to memory at once and noted as a change; `flush` hands the
changes to the store, which applies them to the file's records, and takes over what other processes wrote.
So recording never waits for a disk and may be done in an event loop, while `flush` belongs in a thread, and
several processes (a node, a client, the command line) keep one ledger. Changes that could not be written are
kept, and tried again with the next flush.

Others read while an event is noted, and some without the lock: a peer's record is replaced, never taken out
and put back, since in between one that is banned would be a stranger.

Memory is bounded: beyond the limits of `LedgerConfig` a peer goes (roster.py says which), the oldest proof,
and who weighs least of those that attest. Who goes here is deleted in the file, unless another process has
met it since.

Time is what the last event says. A clock that was ahead and is put right goes back, and takes with it every
time that only the wrong clock can have given: else those would be recent for as long as the clock was off.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Final

from p2pinfer.errors import LocalError
from p2pinfer.recent import Recent

from .account import Account, not_after
from .attestation import Attestation, attested_evidence, weight
from .config import LedgerConfig
from .roster import CLOCK_SLACK_S, Roster
from .store import Change, Changes, LedgerStore, ProofNote

_MAX_UNWRITTEN: Final = 100_000  # changes kept while the file cannot be written; beyond that the oldest go
_MAX_UNCHECKED: Final = 1024  # proofs that were heard of and not checked yet


class Records:
    """Accounts, attestations and notes of proofs. Hold `lock` to read several things as of one moment.

    Attributes:
        roster: The accounts. One of them may be read without the lock.
        attestations: The latest of each author.
        proofs: Those that were checked, by content address.
        unchecked: Those that were only heard of. They are in no file: of them there is no end.
        now: The time of the latest event.
    """

    def __init__(self, config: LedgerConfig) -> None:
        self.roster = Roster(config)
        self.attestations: dict[str, Attestation] = {}
        self.proofs: dict[str, ProofNote] = {}
        self.unchecked = Recent[str, ProofNote](_MAX_UNCHECKED)
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

    @property
    def accounts(self) -> Mapping[str, Account]:
        """Accounts by peer id, the one met last at the end."""
        return self.roster.accounts

    def account(self, peer_id: str) -> Account:
        """The peer's record; a stranger's is empty."""
        return self.roster.get(peer_id)

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
        """Let time pass. It goes back where the clock that gave the latest time was ahead by much."""
        if now >= self.now:
            self.now = now
        elif self.now - now > CLOCK_SLACK_S:
            with self.lock:
                self.now = now
                self._set_back(now)

    def change(self, peer_id: str, change: Change, now: float) -> None:
        """Something happened to do with the peer. What comes late does not turn time back for others."""
        with self.lock:
            self.now = max(self.now, now)
            if self.account(peer_id).latest > now + CLOCK_SLACK_S:
                self._change(peer_id, partial(not_after, now=now))
            self._change(peer_id, change)

    def _change(self, peer_id: str, change: Change) -> None:
        self.roster.put(peer_id, change(self.account(peer_id)))
        if self._store is not None:
            self._changes.accounts.append((peer_id, change))
        self._note_dropped()
        self._attested = None if self.attestations else {}

    def _note_dropped(self) -> None:
        """Have those deleted in the file that lost their place."""
        dropped = self.roster.take_dropped()
        if self._store is not None:
            self._changes.forgotten |= dropped

    def _set_back(self, now: float) -> None:
        """Take `now` for every time that lies ahead of it."""
        for peer_id in self.roster.ahead_of(now):
            self._change(peer_id, partial(not_after, now=now))
        self.attestations = {
            author: said for author, said in self.attestations.items() if said.made_at <= now + CLOCK_SLACK_S
        }
        self._attested = None

    def note_heard(self, address: str, note: ProofNote) -> None:
        """Somebody told of a proof that may be fetched."""
        with self.lock:
            self.unchecked[address] = note

    def note_proof(self, address: str, note: ProofNote) -> None:
        """A proof was checked."""
        with self.lock:
            self.unchecked.pop(address, None)
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
            self.roster = Roster(self._config)
            self.attestations.clear()
            self.proofs.clear()
            self.unchecked.clear()
            self._changes = Changes()
            self._attested = {}

    # ------------------------------------------------------------------ inside

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
        roster = Roster(self._config, contents.accounts.items())
        with self.lock:
            for peer_id, change in self._changes.accounts:
                roster.put(peer_id, change(roster.get(peer_id)))
            self.roster = roster
            self.attestations = {**contents.attestations, **self._changes.attestations}
            self.proofs = {**contents.proofs, **self._changes.proofs}
            self._attested = None
            self._note_dropped()
            if not self.now:  # nobody has told the time yet
                self.now = max((each.latest for each in self.accounts.values()), default=0.0)
            self._set_back(self.now)

    def _replace(self, peer_id: str, account: Account) -> None:
        """Put in what the file says now; what came meanwhile is applied to it again."""
        for other, change in self._changes.accounts:
            if other == peer_id:
                account = change(account)
        self.roster.put(peer_id, account)
        self._note_dropped()
        self._attested = None

    def _put_back(self, changes: Changes) -> None:
        later = self._changes
        self._changes = Changes(
            [*changes.accounts, *later.accounts][-_MAX_UNWRITTEN:],
            {**changes.attestations, **later.attestations},
            {**changes.proofs, **later.proofs},
            {**changes.forgotten, **later.forgotten},
        )
