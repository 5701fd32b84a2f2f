"""Audits of training: passes that hops have signed for are run again, a few of each hop, chosen afterwards.

    pass comes back -> coin, or strays from the running means -> slot of its hop -> run again -> ledger
                                                                  FAIL -> as in `auditor.py`

The client has all that a pass was given and all that it returned, so nothing has to be fetched. The coin is
tossed after the receipt has come: nobody can know it earlier, this process included. Each hop has one slot
for its forward passes and one for its backward passes. If it is taken, a newer pass replaces the older one
with the probability that makes all since the last audit alike. So whatever waits is bounded, and every pass
may be the one.

Running a pass again takes three to four times what it took. So audits take `audit.training_share` of the
time, but for the first one of each slot and those of passes that stray, which come at once.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import trio

from p2pinfer.client_config import AuditConfig
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.evidence.pass_record import PassRecord
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proof import Proof
from p2pinfer.reputation.receipt import digest_of
from p2pinfer.reputation.verdict import Finding, Verdict

from .backlog import contained
from .running_means import RunningMeans
from .verifier import Verifier

logger = logging.getLogger(__name__)

MAX_SLOTS: Final = 128  # of hops whose passes are remembered
FIRST_AUDITS: Final = 1  # of each slot that wait for no budget

Note = Callable[[str, Finding], None]
Accuse = Callable[[Proof, Mapping[bytes, bytes], str], Awaitable[None]]
AskOthers = Callable[[PassRecord, Sequence[str]], AsyncGenerator[PassRecord]]


@dataclass(slots=True)
class _Slot:
    """Passes of one hop in one direction: the one that waits, and what is known of the others."""

    peer_id: str
    waiting: PassRecord | None = None
    is_due: bool = False  # it strays, so it is audited whatever the coin says, and before others
    chosen: int = 0  # since the last audit
    audits: int = 0
    passes: int = 0
    means: RunningMeans = field(default_factory=RunningMeans)

    @property
    def is_urgent(self) -> bool:
        """True if something waits that no budget holds up."""
        return self.waiting is not None and (self.is_due or self.audits < FIRST_AUDITS)


class TrainingAudits:
    """Audits the passes of one client's trainings. `serve` does the work; everything else returns at once.

    Args:
        note: Told of every outcome.
        accuse: Bans a peer and publishes the proof.
        ask_others: Results of other peers for the same pass, one after the other.
        clock: The ledger's time in seconds.
        stopwatch: The time that the budget is in, in seconds.
        rng: The coin.
    """

    def __init__(
        self,
        ledger: Ledger,
        verifier: Verifier,
        config: AuditConfig,
        note: Note,
        accuse: Accuse,
        ask_others: AskOthers,
        *,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._ledger = ledger
        self._verifier = verifier
        self._config = config
        self._note = note
        self._accuse = accuse
        self._ask_others = ask_others
        self._clock = clock
        self._stopwatch = stopwatch
        self._rng = rng or random.SystemRandom()
        self._slots: dict[tuple[str, str], _Slot] = {}
        self._news = Pulse()
        self._is_busy = False
        self._resumes_at = 0.0
        self._has_passed = False

    # ------------------------------------------------------------------ a trainer's side

    def passed(self, record: PassRecord, figures: Mapping[str, float]) -> None:
        """See `learning.pass_watch.PassWatch`."""
        peer_id, receipt = record.peer_id, record.receipt
        if self._ledger.is_banned(peer_id):
            return
        key = (peer_id, receipt.kind)
        if key not in self._slots and len(self._slots) >= MAX_SLOTS:
            self._slots.pop(next(iter(self._slots)))
        slot = self._slots.setdefault(key, _Slot(peer_id))
        slot.passes += 1
        kind = (receipt.kind, receipt.start, receipt.stop, len(figures))
        asked = digest_of(receipt.input + receipt.gradient + receipt.adapter + receipt.call)
        strays = slot.means.strays(kind, figures, asked=asked, output=receipt.output)
        if strays:
            logger.debug("training.strays peer=%s kind=%s", peer_id, receipt.kind)
        if not strays and (slot.is_due or self._rng.random() >= self._rate_of(peer_id)):
            return
        slot.chosen += 1
        if slot.waiting is None or strays or self._rng.random() * slot.chosen < 1:
            slot.waiting = record
            slot.is_due |= strays
        self._news.fire()

    def is_banned(self, peer_id: str) -> bool:
        """See `learning.pass_watch.PassWatch`."""
        return self._ledger.is_banned(peer_id)

    def _rate_of(self, peer_id: str) -> float:
        if self._config.rate is not None:
            return self._config.rate
        return self._ledger.audit_probability(peer_id, self._clock())

    # ------------------------------------------------------------------ the audits

    async def serve(self) -> None:
        """Do the audits, one at a time, until cancelled."""
        while True:
            slot = self._next()
            if slot is None:
                with trio.move_on_after(max(0.0, self._resumes_at - self._stopwatch()) or float("inf")):
                    await self._news.wait()
                continue
            record, slot.waiting = slot.waiting, None
            slot.is_due, slot.chosen = False, 0
            assert record is not None
            self._is_busy = True
            begun = self._stopwatch()
            try:
                with contained(f"a pass of {slot.peer_id}"):
                    await self._audit(record, slot)
            finally:
                spent = self._stopwatch() - begun
                share = self._config.training_share
                self._resumes_at = max(self._resumes_at, begun) + spent / share
                self._is_busy = False
                self._news.fire()

    def _next(self) -> _Slot | None:
        """The slot whose pass is next: one that cannot wait, else by turns as the budget allows."""
        waiting = [
            slot
            for slot in self._slots.values()
            if slot.waiting is not None and not self._ledger.is_banned(slot.peer_id)
        ]
        fresh = [slot for slot in waiting if slot.is_urgent]
        if not fresh and self._stopwatch() < self._resumes_at:
            return None
        return min(fresh or waiting, key=lambda slot: (not slot.is_due, slot.audits), default=None)

    async def settled(self) -> None:
        """Wait until no audit is under way, nor one that cannot wait is to come."""
        while self._is_busy or any(
            slot.waiting is not None
            and slot.audits < FIRST_AUDITS
            and not self._ledger.is_banned(slot.peer_id)
            for slot in self._slots.values()
        ):
            await self._news.wait()

    async def _audit(self, record: PassRecord, slot: _Slot) -> None:
        finding, failed = await self._judge(record)
        slot.audits += 1
        if finding.verdict is Verdict.PASS:
            self._has_passed = True
            slot.means.begin_anew()
        self._note(record.peer_id, finding)
        if finding.verdict is not Verdict.FAIL:
            return
        logger.warning(
            "%s returned wrong results for blocks %s, in one of %d passes of this training: %s",
            record.peer_id,
            record.span,
            slot.passes,
            finding.reason,
        )
        await self._prove(record, finding)
        for each, why in failed:
            self._note(each.peer_id, why)
            await self._prove(each, why)

    async def _judge(self, record: PassRecord) -> tuple[Finding, list[tuple[PassRecord, Finding]]]:
        """The verdict; FAIL only if others and blocks that are loaded anew say so too (see `auditor.py`).

        Beside it come others' passes that were found to fail themselves.
        """
        verifier = self._verifier
        if not verifier.can_hold(record.span):
            return Finding(Verdict.INCONCLUSIVE, f"blocks {record.span} do not fit here"), []
        finding = await verifier.verify_pass(record)
        if finding.verdict is not Verdict.FAIL:
            return finding, []
        failed: list[tuple[PassRecord, Finding]] = []
        others = tuple({slot.peer_id for slot in self._slots.values()})
        if self._config.remote:
            async with aclosing(self._ask_others(record, others)) as opinions:
                async for opinion in opinions:
                    other = await verifier.verify_pass(opinion)
                    if other.verdict is Verdict.PASS:
                        self._has_passed = True
                        break
                    if other.verdict is Verdict.FAIL:
                        failed.append((opinion, other))
        if failed and not self._has_passed:
            names = ", ".join(each.peer_id for each, _ in failed)
            doubt = f"{finding.reason}; {names} gave no better, and nobody has passed yet"
            return Finding(Verdict.SUSPECT, doubt), []
        again = await verifier.confirm_pass(record)
        if again.verdict is not Verdict.FAIL:
            return Finding(Verdict.SUSPECT, f"{finding.reason}; once more: {again.reason}"), []
        return again, failed

    async def _prove(self, record: PassRecord, finding: Finding) -> None:
        proof = Proof(1, record.peer_id, "training", (record.signed,), record.others)
        contents = {digest: bytes(content) for digest, content in record.contents.items()}
        await self._accuse(proof, contents, finding.reason)
