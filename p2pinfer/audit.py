"""Checks, after a session and on a coin that nobody else sees, whether its hops did what they signed for.

    session closes -> coin -> evidence -> run again -> verdict -> ledger
                                              FAIL -> run again independently -> ban, proof -> swarm

Whether a session is going to be checked is decided when it opens, because what it sends must be kept then.
A FAIL alone costs nobody anything: somebody else, or weights that are loaded anew, must agree. Proofs of
others are held against the same blocks before they count.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from p2pinfer.errors import Equivocation, P2PInferError, PeerError
from p2pinfer.models.spec import ModelSpec
from p2pinfer.node.deposition import Deposition, history_of
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.proofs import Heard
from p2pinfer.node.swarm import SwarmMember
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proof import Accusation, Proof
from p2pinfer.reputation.proofs import ProofDecision
from p2pinfer.reputation.receipt import Payload
from p2pinfer.reputation.verdict import Finding, Verdict
from p2pinfer.routing.route import Hop, Route

from .gather import Gathered, gather_deposition
from .receipts import PassedStep
from .second_opinion import choose_auditors, run_elsewhere
from .session import Session
from .verifier import AuditConfig, LocalVerifier, Verifier, compare_elsewhere

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # audits; what comes on top is not checked
SECOND_OPINIONS = 3  # peers that are tried for one


@dataclass(frozen=True, slots=True)
class AuditTally:
    """What audits have come to so far."""

    done: int = 0
    passed: int = 0
    failed: int = 0
    suspect: int = 0
    inconclusive: int = 0

    def plus(self, verdict: Verdict) -> AuditTally:
        """One audit more."""
        name = {"pass": "passed", "fail": "failed"}.get(verdict.value, verdict.value)
        return replace(self, **{name: getattr(self, name) + 1, "done": self.done + 1})


class Auditor:
    """Checks the sessions of one client. `serve` does the work; everything else returns at once.

    Args:
        verifier: What says whether an output is right.
        host_config: For the hosts under throw-away identities; they do not listen.
        clock: The ledger's time in seconds.
        rng: The coin. Nobody but this process may know what it will show.
    """

    def __init__(
        self,
        member: SwarmMember,
        spec: ModelSpec,
        ledger: Ledger,
        verifier: Verifier,
        config: AuditConfig,
        *,
        host_config: HostConfig | None = None,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self.tally = AuditTally()
        self._member = member
        self._spec = spec
        self._ledger = ledger
        self._verifier = verifier
        self._config = config
        self._host_config = replace(host_config or HostConfig(), listen=())
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._pending = 0
        self._settled = trio.Event()
        self._settled.set()
        self._jobs_in, self._jobs = trio.open_memory_channel[_Job](MAX_WAITING)
        member.proofs.on_proof = self.examine
        member.proofs.is_wanted = self._is_wanted

    def toss(self, route: Route) -> frozenset[str]:
        """The hops to be checked after a session over `route` that is about to open."""
        return frozenset(hop.peer_id for hop in route.hops if self._rng.random() < self._rate_of(hop.peer_id))

    def _rate_of(self, peer_id: str) -> float:
        if self._config.rate is not None:
            return self._config.rate
        return self._ledger.audit_probability(peer_id, self._clock())

    def session_closed(self, session: Session, chosen: frozenset[str]) -> None:
        """Queue what the coin chose. Whoever replaced a hop meanwhile gets a coin of its own."""
        book = session.book
        if book is None or session.broken_receipt is not None:
            error = session.broken_receipt
            if isinstance(error, Equivocation):
                self._queue(_Job(error.peer_id, (), error.receipts))
            return
        opened_with = set(session.opened_route.peer_ids)
        newcomers = [
            Hop(hop.peer_id, hop.span)
            for hop in {hop.peer_id: hop for each in book.kept for hop in each.hops}.values()
            if hop.peer_id not in opened_with
        ]
        if newcomers:
            chosen |= self.toss(Route(tuple(newcomers)))
        for peer_id in chosen if book.kept else ():
            self._queue(_Job(peer_id, tuple(book.kept)))

    def _queue(self, job: _Job) -> None:
        try:
            self._jobs_in.send_nowait(job)
        except trio.WouldBlock:
            logger.debug("audit.dropped peer=%s", job.peer_id)
            return
        self._pending += 1
        if self._settled.is_set():
            self._settled = trio.Event()

    async def settled(self) -> None:
        """Wait until every audit that was begun is done."""
        while self._pending:
            await self._settled.wait()

    async def serve(self) -> None:
        """Do the audits, one after the other, until cancelled."""
        async for job in self._jobs:
            try:
                await self._audit(job)
            finally:
                self._pending -= 1
                if not self._pending:
                    self._settled.set()

    async def _audit(self, job: _Job) -> None:
        if job.contradiction:
            await self._accuse(
                Proof(1, job.peer_id, "equivocation", job.contradiction), {}, "it signed twice"
            )
            return
        if self._ledger.is_banned(job.peer_id):
            return
        finding, gathered = Finding(Verdict.INCONCLUSIVE, "it took too long"), Gathered(None)
        with trio.move_on_after(self._config.timeout_s):
            gathered = await gather_deposition(
                self._member.host,
                job.steps,
                job.peer_id,
                self._spec.hidden_size,
                self._config.evidence_bytes,
            )
            finding = await self._judge(gathered.deposition, job.others)
        self.tally = self.tally.plus(finding.verdict)
        self._member.host.counts.add("audits", finding.verdict.value)
        logger.info("audited %s: %s, %s", job.peer_id, finding.verdict.value, finding.reason)
        now, deposition = self._clock(), gathered.deposition
        why = gathered.withheld or finding.reason
        self._ledger.record_audit(
            job.peer_id, finding.verdict, now, withheld=bool(gathered.withheld), why=why
        )
        if finding.verdict is Verdict.FAIL and deposition is not None:
            proof = Proof(1, job.peer_id, "output", deposition.signed)
            await self._accuse(proof, deposition.contents, finding.reason)

    async def _judge(self, deposition: Deposition | None, others: Sequence[str]) -> Finding:
        """The verdict; FAIL only if a second re-execution, independent of the first, says so too."""
        if deposition is None:
            return Finding(Verdict.INCONCLUSIVE, "its evidence is not to be had")
        verifier = self._verifier
        if isinstance(verifier, LocalVerifier) and not verifier.can_hold(deposition.span):
            return await self._judge_elsewhere(deposition, others)
        finding = await verifier.verify(deposition)
        if finding.verdict is not Verdict.FAIL:
            return finding
        for opinion in await self._ask_others(deposition, others, 1):
            other = await verifier.verify(opinion)
            if other.verdict is Verdict.FAIL:
                return Finding(
                    Verdict.SUSPECT, f"{finding.reason}; {opinion.peer_id} gives no better: {other.reason}"
                )
        again = await (verifier.confirm if isinstance(verifier, LocalVerifier) else verifier.verify)(
            deposition
        )
        if again.verdict is Verdict.FAIL:
            return again
        return Finding(Verdict.SUSPECT, f"{finding.reason}; once more: {again.reason}")

    async def _judge_elsewhere(self, deposition: Deposition, others: Sequence[str]) -> Finding:
        opinions = await self._ask_others(deposition, others, 2)
        if len(opinions) < 2:
            return Finding(Verdict.INCONCLUSIVE, "the blocks do not fit here, and no two others ran them")
        return await trio.to_thread.run_sync(
            compare_elsewhere, deposition, opinions[0], opinions[1], self._spec.hidden_size
        )

    async def _ask_others(
        self, deposition: Deposition, others: Sequence[str], count: int
    ) -> list[Deposition]:
        """What up to `count` independent peers give for the same inputs."""
        if not self._config.remote:
            return []
        history = await trio.to_thread.run_sync(history_of, deposition, self._spec.hidden_size)
        able = choose_auditors(
            self._member.announcements(self._spec.revision), deposition, self._ledger, others, self._rng
        )
        opinions: list[Deposition] = []
        for hop in able[:SECOND_OPINIONS]:
            if len(opinions) == count:
                break
            try:
                opinions.append(
                    await run_elsewhere(
                        hop,
                        self._spec,
                        deposition,
                        history,
                        host_config=self._host_config,
                        timeout_s=self._config.timeout_s / 4,
                    )
                )
            except PeerError as exc:
                logger.debug("audit.no_opinion peer=%s why=%s", hop.peer_id, exc)
        return opinions

    async def _accuse(self, proof: Proof, contents: Mapping[bytes, Payload], why: str) -> None:
        """Ban, and let everybody see why."""
        try:
            address = await self._member.proofs.publish(proof, contents)
        except P2PInferError as exc:
            logger.warning("the proof against %s could not be published: %s", proof.peer_id, exc)
            self._ledger.ban(proof.peer_id, why, self._clock())
            return
        self._ledger.add_proof(address.hex(), proof.peer_id, self._clock(), verified=True, why=why)

    # ------------------------------------------------------------------ proofs of others

    def _is_wanted(self, heard: Heard) -> bool:
        """Whether a proof is worth fetching."""
        notice = heard.notice
        decision = self._ledger.weigh_proof(notice.proof.hex(), notice.accused, heard.author, self._clock())
        return decision is ProofDecision.FETCH

    async def examine(
        self, heard: Heard, accusation: Accusation, contents: Mapping[bytes, Payload]
    ) -> bool | None:
        """Run the blocks of somebody else's proof again; ban only if that confirms it."""
        notice, why = heard.notice, "two receipts for one step"
        if accusation.kind == "output":
            signed = accusation.signed
            deposition = Deposition(accusation.peer_id, signed, accusation.receipts, contents)
            finding = await self._verifier.verify(deposition)
            if finding.verdict in (Verdict.INCONCLUSIVE, Verdict.SUSPECT):
                return None
            why = finding.reason
            if finding.verdict is Verdict.PASS:
                self._ledger.add_proof(
                    notice.proof.hex(), notice.accused, self._clock(), verified=False, sender=heard.author
                )
                return False
        self._ledger.add_proof(
            notice.proof.hex(), notice.accused, self._clock(), verified=True, sender=heard.author, why=why
        )
        return True


@dataclass(frozen=True, slots=True)
class _Job:
    """A hop to be checked, and the steps of the session; or two receipts that contradict each other."""

    peer_id: str
    steps: tuple[PassedStep, ...]
    contradiction: tuple[bytes, ...] = ()

    @property
    def others(self) -> tuple[str, ...]:
        """Who else had to do with the session."""
        return tuple({hop.peer_id for each in self.steps for hop in each.hops})
