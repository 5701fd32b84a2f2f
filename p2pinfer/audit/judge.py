"""Judge of a hop's record: runs it again here or has others do it, and confirms a FAIL before it counts.

    the blocks fit here    run again -> FAIL -> others run it -> weights loaded anew -> FAIL, or SUSPECT
    they do not            others run it until one side is far enough ahead     -> PASS, or SUSPECT

Who is asked to confirm a FAIL has a limited time, all together. What was found here does not get lost where
they are slow: whoever lies may have friends among them.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import trio

from p2pinfer.client_config import AuditConfig
from p2pinfer.errors import PeerError
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.models.learning.adapter import Adapter
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.end_claims import EndClaims
from p2pinfer.node.evidence.hop_record import HopRecord, history_of
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Finding, Verdict

from .draw import AuditDraw
from .opinions import MOST_OPINIONS, Vote, compare_elsewhere
from .second_opinion import choose_auditors, draw_successors, run_elsewhere
from .verifier import Verifier

logger = logging.getLogger(__name__)

FindAdapter: TypeAlias = Callable[[str, BlockSpan], Adapter | None]  # by revision and span
SECOND_OPINIONS = 4  # peers that are tried where one that passes would do
OUTVOTED = Finding(Verdict.SUSPECT, "three others agree that what it gave was wrong", contradicted=True)


@dataclass(frozen=True, slots=True)
class Opinion:
    """Record of a peer's work, and the verdict on it."""

    peer_id: str
    record: HopRecord | None
    finding: Finding


class Judge:
    """Judge of one client's audits.

    Args:
        draw: Whose coins say which audits are glances, and whose budget pays for all of them.
        host_config: For the hosts under throw-away identities.
        clock: The ledger's time in seconds.
        rng: Draws whom to ask.
        find_adapter: Finds what a session's revision names beside the model.

    Attributes:
        has_passed: True if a re-execution here ever agreed with anybody.
    """

    def __init__(
        self,
        member: SwarmMember,
        spec: ModelSpec,
        ledger: Ledger,
        verifier: Verifier,
        config: AuditConfig,
        draw: AuditDraw,
        *,
        host_config: HostConfig,
        clock: Callable[[], float] = time.time,
        rng: random.Random,
        find_adapter: FindAdapter = lambda revision, span: None,
    ) -> None:
        self.has_passed = False
        self._member = member
        self._spec = spec
        self._ledger = ledger
        self._verifier = verifier
        self._config = config
        self._draw = draw
        self._host_config = host_config
        self._clock = clock
        self._rng = rng
        self._find_adapter = find_adapter

    async def judge(
        self, record: HopRecord | None, others: Sequence[str], on_fail: Callable[[], None]
    ) -> tuple[Finding, list[Opinion]]:
        """The verdict; FAIL only if a second re-execution, independent of the first, says so too.

        Args:
            others: Peers that had to do with the session.
            on_fail: Called when a FAIL is about to be confirmed.

        Returns:
            The verdict, and peers that were asked for a second opinion and found to fail themselves, or
            outvoted.
        """
        if record is None:
            return Finding(Verdict.INCONCLUSIVE, "its evidence is not to be had"), []
        if record.is_adapted:
            adapter = await trio.to_thread.run_sync(self._find_adapter, record.revision, record.span)
            if adapter is None:
                return Finding(Verdict.INCONCLUSIVE, "the adapter of its session is not here any more"), []
            record = replace(record, adapter=adapter)
        verifier, paid = self._verifier, partial(self._draw.paid, record.peer_id)
        if not verifier.can_hold(record.span):
            # Most audits of a peer that has passed some ask one other: so there are twice as many.
            lead = 1 if self._draw.is_glance(record.peer_id) else 2
            return await self.judge_elsewhere(record, others, lead)
        if self._draw.is_glance(record.peer_id):
            glance = paid(await verifier.glance(record))
            if glance.verdict is Verdict.PASS:
                return glance, []
        finding = paid(await verifier.verify(record))
        if finding.verdict is not Verdict.FAIL:
            return finding, []
        on_fail()
        # Others come before a second look of our own: a fault of this computer would fail honest peers again
        # and again. As long as nobody has passed here, a second peer that fails speaks against us.
        failed: list[Opinion] = []
        with trio.move_on_after(self._config.timeout_s / 2):
            await self._look_at_others(record, others, finding, failed)
        if failed and not self.has_passed:
            names = ", ".join(each.peer_id for each in failed)
            doubt = f"{finding.reason}; {names} gave no better, and nobody has passed yet"
            return Finding(Verdict.SUSPECT, doubt), []
        # From weights that are loaded anew: a bit that flipped in our memory must not ban an honest peer.
        again = paid(await verifier.confirm(record))
        if again.verdict is not Verdict.FAIL:
            return Finding(Verdict.SUSPECT, f"{finding.reason}; once more: {again.reason}"), []
        return again, failed

    async def judge_ends(self, record: HopRecord, claims: EndClaims) -> Finding:
        """The verdict on what a hop embedded or drew."""
        return self._draw.paid(record.peer_id, await self._verifier.verify_ends(record, claims))

    async def _look_at_others(
        self, record: HopRecord, others: Sequence[str], finding: Finding, failed: list[Opinion]
    ) -> None:
        """Have others run it until one passes; those that fail as well are added to `failed`."""
        verify = self._verifier.verify_fully if finding.logits_checked else self._verifier.verify
        async with aclosing(self._ask_others(record, others)) as opinions:
            async for opinion in opinions:
                other = self._draw.paid(record.peer_id, await verify(opinion))
                if other.verdict is Verdict.PASS:
                    self.has_passed = True
                    return
                if other.verdict is Verdict.FAIL:
                    failed.append(Opinion(opinion.peer_id, opinion, other))

    async def judge_elsewhere(
        self,
        record: HopRecord,
        others: Sequence[str],
        lead: int = 2,
        pay: Callable[[float], None] | None = None,
    ) -> tuple[Finding, list[Opinion]]:
        """The verdict of others where the blocks do not fit here, and those of them who were outvoted.

        Args:
            others: Peers that had to do with the session.
            lead: See `compare_elsewhere`.
            pay: Told how long each of them worked, seconds; None: the budget of audits.
        """
        opinions: list[HopRecord] = []
        vote = Vote(Finding(Verdict.INCONCLUSIVE, "the blocks do not fit here, and too few others ran them"))
        async with aclosing(self._ask_others(record, others, MOST_OPINIONS, pay)) as asked:
            async for opinion in asked:
                opinions.append(opinion)
                compare = partial(compare_elsewhere, record, tuple(opinions), self._spec.hidden_size, lead)
                vote = await trio.to_thread.run_sync(compare)
                if vote.finding.verdict is not Verdict.INCONCLUSIVE:
                    break
        return vote.finding, [
            Opinion(opinions[index].peer_id, opinions[index], OUTVOTED) for index in vote.outvoted
        ]

    async def have_voted(self, record: HopRecord) -> Finding:
        """The verdict of others on what was published as a proof, where the blocks do not fit here.

        Whoever is outvoted, the accused or those who answered, is charged for it in the ledger.
        """
        if not self._draw.budget.has_for_votes:
            return Finding(Verdict.INCONCLUSIVE, "the blocks do not fit here, and others would cost too much")
        finding, outvoted = await self.judge_elsewhere(record, (), pay=self._draw.budget.pay_vote)
        for each in (Opinion(record.peer_id, record, finding), *outvoted):
            if each.finding.contradicted:
                self._ledger.record_audit(
                    each.peer_id,
                    each.finding.verdict,
                    self._clock(),
                    contradicted=True,
                    accused=each.record is record,
                    why=each.finding.reason,
                )
        return finding

    async def _ask_others(
        self,
        record: HopRecord,
        others: Sequence[str],
        most: int = SECOND_OPINIONS,
        pay: Callable[[float], None] | None = None,
    ) -> AsyncGenerator[HopRecord]:
        """Outputs of independent peers for the same inputs, of those asked at most so many."""
        if not self._config.remote or record.is_adapted:  # which strangers would have to be brought
            return
        history = await trio.to_thread.run_sync(history_of, record, self._spec.hidden_size)
        avoided = (*others, *self._config.own_peers)
        known = self._member.announcements(self._spec.revision)
        for hop in choose_auditors(known, record, self._ledger, avoided, self._rng)[:most]:
            accused = (record.peer_id, self._member.peer_id)
            after = draw_successors(hop, known, self._spec, self._ledger, accused, self._rng)
            try:
                opinion = await run_elsewhere(
                    hop,
                    self._spec,
                    record,
                    history,
                    after=after,
                    host_config=self._host_config,
                    timeout_s=self._config.timeout_s / 4,
                    on_work=pay or partial(self._draw.pay_opinion, record.peer_id),
                )
            except PeerError as exc:
                logger.debug("audit.no_opinion peer=%s why=%s", hop.peer_id, exc)
            else:
                yield opinion
