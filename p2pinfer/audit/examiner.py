"""Examiner: runs the blocks of others' proofs again, and bans only if that confirms them.

    notice -> ledger: worth a fetch? -> fetched -> ledger: still? -> budget -> own audits first -> run again

Anybody can make true proofs about keys of its own, as many and as long as it likes. So what they may cost is
bounded before it is paid: the notice says how many tokens went through how many blocks, the carrier holds the
proof to it, and the examiner spends no more than a share of its time. Proofs about peers that were met here
have a budget of their own. No proof is run while an audit of our own waits.

Where the blocks do not fit here, others are asked to run those of a peer that was met, once in six hours for
each peer. So what clients that hold the blocks have found reaches the others too. A vote of others bans
nobody: the peer loses integrity, as by a failed audit, and is passed over while there are others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

import trio

from p2pinfer.client_config import AuditConfig
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.evidence.pass_record import PassRecord
from p2pinfer.node.swarm.proof_gossip import Heard
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proof import Accusation
from p2pinfer.reputation.proofs import ProofDecision
from p2pinfer.reputation.receipt import Payload
from p2pinfer.reputation.verdict import Finding, Verdict

from .backlog import contained
from .examination_budget import BURST_S, STRANGERS_BURST_S, ExaminationBudget
from .verifier import Verifier

logger = logging.getLogger(__name__)

TRIAL_EVERY_S: Final = 6 * 3600.0  # within which others are asked once about proofs against one peer
HaveVoted: TypeAlias = Callable[[HopRecord], Awaitable[Finding]]
OWN_FIRST_S: Final = 60.0  # how long audits of our own go before, one after the other


class Examiner:
    """Looks at the proofs that a carrier brings.

    Args:
        own_settled: Returns when no audit of our own waits.
        have_voted: Has others run a span whose blocks do not fit here, and notes what they say; None: nobody.
        clock: The ledger's time in seconds.
        stopwatch: The time that the budget is in, in seconds.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ledger: Ledger,
        verifier: Verifier,
        config: AuditConfig,
        own_settled: Callable[[], Awaitable[None]],
        *,
        have_voted: HaveVoted | None = None,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._ledger = ledger
        self._verifier = verifier
        self._own_settled = own_settled
        self._have_voted = have_voted
        self._tried_at: dict[str, float] = {}
        self._clock = clock
        self._stopwatch = stopwatch
        self._turn = trio.Lock()
        self._budgets = {
            about_met: ExaminationBudget(config.proofs_share / 2, spec.block_parameters, stopwatch(), burst_s)
            for about_met, burst_s in ((True, BURST_S), (False, STRANGERS_BURST_S))
        }

    def is_wanted(self, heard: Heard) -> bool:
        """True if a proof is worth fetching: of this model, as nobody here can judge another's."""
        notice = heard.notice
        if notice.revision != self._spec.revision:
            return False
        decision = self._ledger.weigh_proof(notice.proof.hex(), notice.accused, heard.author, self._clock())
        return decision is ProofDecision.FETCH

    async def examine(
        self, heard: Heard, accusation: Accusation, contents: Mapping[bytes, Payload]
    ) -> bool | None:
        """Run the blocks of somebody else's proof again.

        Receipts of another model prove nothing here: a notice may come by a neighbour's table, which holds
        those of all models, and run against our weights an honest peer's outputs would look wrong.

        Returns:
            True if it holds, False if it does not, None if that cannot be told, or not at this price.
        """
        address, accused = heard.notice.proof.hex(), heard.notice.accused
        if {heard.notice.revision, *accusation.revisions} != {self._spec.revision}:
            return None
        # One after the other: each pays before the next one asks what is left.
        async with self._turn:
            if not self._ledger.may_examine(address, accused, heard.author, self._clock()):
                return None
            holds: bool | None = True
            why = "two receipts for one step"
            if accusation.kind != "equivocation":
                holds, why = await self._run_again(heard, accusation, contents)
            if holds is not None:
                now, said = self._clock(), why if holds else ""
                self._ledger.add_proof(address, accused, now, verified=holds, sender=heard.author, why=said)
            return holds

    async def _run_again(
        self, heard: Heard, accusation: Accusation, contents: Mapping[bytes, Payload]
    ) -> tuple[bool | None, str]:
        """True if the outputs are wrong, None if that cannot be told; and why."""
        units = self._units_of(accusation)
        budget = self._budgets[self._ledger.account(accusation.peer_id).is_met]
        if not budget.affords(heard.author, units, self._stopwatch()):
            logger.debug("proof.too_dear proof=%s units=%d", heard.notice.proof.hex(), units)
            return None, ""
        with trio.move_on_after(OWN_FIRST_S):
            await self._own_settled()
        began_at = self._stopwatch()
        finding, is_thorough = Finding(Verdict.INCONCLUSIVE, ""), False
        try:
            with contained("a proof"):
                finding, is_thorough = await self._find(accusation, contents)
        finally:
            now = self._stopwatch()
            budget.pay(heard.author, units, now - began_at, now)
        if finding.verdict is Verdict.FAIL:
            return True, finding.reason
        # A quick PASS does not refute a proof: what it misses may be the very lie, and who told of it would
        # be taken for a liar.
        if finding.verdict is Verdict.PASS and is_thorough:
            return False, finding.reason
        return None, finding.reason

    async def _find(self, accusation: Accusation, contents: Mapping[bytes, Payload]) -> tuple[Finding, bool]:
        """The verdict on a proof, and if a PASS refutes it."""
        if accusation.training is not None:
            (signed,) = accusation.signed
            passed = PassRecord(accusation.peer_id, signed, accusation.training, contents)
            return await self._verifier.verify_pass(passed), True
        record = HopRecord(accusation.peer_id, accusation.signed, accusation.receipts, contents)
        if not self._verifier.can_hold(record.span):
            return await self._have_it_voted(record), True
        finding = await self._verifier.verify_fully(record)
        return finding, self._verifier.is_thorough(finding)

    async def _have_it_voted(self, record: HopRecord) -> Finding:
        """PASS, SUSPECT or INCONCLUSIVE by others; only of peers that this client may use, and seldom."""
        peer_id, now = record.peer_id, self._clock()
        self._tried_at = {each: at for each, at in self._tried_at.items() if 0 <= now - at < TRIAL_EVERY_S}
        may_be_used = self._ledger.account(peer_id).is_met
        if self._have_voted is None or not may_be_used or peer_id in self._tried_at:
            return Finding(Verdict.INCONCLUSIVE, "the blocks do not fit here, and others are not asked")
        self._tried_at[peer_id] = now
        return await self._have_voted(record)

    def _units_of(self, accusation: Accusation) -> int:
        """Tokens times blocks of a re-execution: three runs of the span, and four of what follows it."""
        tokens, blocks = accusation.extent
        runs = 3 * blocks
        if accusation.training is None:
            runs += 4 * max(0, self._spec.num_blocks - accusation.receipts[0].stop)
        return tokens * runs
