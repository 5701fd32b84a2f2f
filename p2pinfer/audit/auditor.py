"""Auditor: recomputes some hops' work after a session, chosen by a coin that nobody else sees.

    session closes -> coin -> evidence -> run again -> verdict -> ledger
                                              FAIL -> run again independently -> ban, proof -> swarm

Whether a session is going to be checked is decided when it opens, because what it sends must be kept then.
A FAIL alone costs nobody anything: somebody else, or weights that are loaded anew, must agree. Should others
fail as well, it is us who may be wrong, unless somebody has passed before. Proofs of others are held against
the same blocks before they count.

Some audits have no result. Where that lies with the hop, whose evidence is withheld, late or does not fit,
it costs the hop; where it does not, or cannot be told, it costs nobody. A few audits run at once, so that one
slow hop holds up no other's. An error in one of them ends that one.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from p2pinfer.client_config import AuditConfig
from p2pinfer.errors import Equivocation, P2PInferError, PeerError
from p2pinfer.events import AuditDone, Report
from p2pinfer.models.checkpoint.source import ModelSource
from p2pinfer.models.checkpoint.spec import ModelSpec
from p2pinfer.node.concurrency.pulse import Pulse
from p2pinfer.node.evidence.hop_record import HopRecord
from p2pinfer.node.host_config import HostConfig, dialling_only
from p2pinfer.node.swarm.membership import SwarmMember
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proof import Proof
from p2pinfer.reputation.receipt import Payload
from p2pinfer.reputation.small_lies import sample_of
from p2pinfer.reputation.verdict import Finding, Verdict, is_too_short
from p2pinfer.routing.route import Route
from p2pinfer.session.session import Session

from .backlog import Backlog, ClosedSession, Job, beginning_of, contained
from .collect import claims_of, collect_record
from .draw import AuditBudget, AuditDraw
from .evidence_source import Line
from .examiner import Examiner
from .judge import FindAdapter, Judge, Opinion
from .kept_jobs import job_folder
from .local_verifier import LocalVerifier
from .tally import AuditTally as AuditTally
from .training_audits import TrainingAudits
from .training_opinions import RunPass, opinions_by
from .verifier import Verifier

logger = logging.getLogger(__name__)

AT_ONCE = 4  # audits; evidence of one is fetched while another one is judged
MAX_CLOSED = 64  # sessions whose receipts are still to be checked
HAND_OUT_S = 5.0  # how long whoever publishes a proof stays for the first to fetch it


class Auditor:
    """Checks the sessions of one client. `serve` does the work; everything else returns at once.

    Args:
        verifier: What says whether an output is right.
        host_config: For the hosts under throw-away identities; they do not listen.
        clock: The ledger's time in seconds.
        rng: The coin. Nobody but this process may know what it will show.
        report: Called with every audit's outcome.
        kept_in: Data directory where audits are kept until they are done; None: in memory alone.
        blame: Charges the peer that broke a receipt, or both neighbours where it is between them.
        find_adapter: Finds the adapter that a session's revision names.
        run_pass: Has another peer run a pass of training again; None: nobody is asked about training.
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
        report: Report | None = None,
        kept_in: Path | None = None,
        run_pass: RunPass | None = None,
        find_adapter: FindAdapter = lambda revision, span: None,
        blame: Callable[[PeerError], None],
    ) -> None:
        self.tally = AuditTally()
        self._member = member
        self._spec = spec
        self._ledger = ledger
        self._config = config
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._report: Report = report or (lambda _: None)
        self._blame = blame
        self._draw = AuditDraw(ledger, config, clock, self._rng)
        self._line = Line()
        self._backlog = Backlog(job_folder(kept_in, spec.revision, config.queue_bytes), clock)
        hosts = dialling_only(host_config or HostConfig())  # under identities that are thrown away
        self._judge = Judge(
            member,
            spec,
            ledger,
            verifier,
            config,
            self._draw,
            host_config=hosts,
            clock=clock,
            rng=self._rng,
            find_adapter=find_adapter,
        )
        self._failing: set[str] = set()  # peers of which a FAIL is being confirmed
        self._confirmed = Pulse()
        self._closed_in, self._closed = trio.open_memory_channel[ClosedSession](MAX_CLOSED)
        opinions = opinions_by(run_pass, member, ledger, config, hosts, self._rng)
        told = (self._note, self._publish, opinions)
        self.training = TrainingAudits(ledger, verifier, config, *told, clock=clock, rng=self._rng)
        self.examiner = Examiner(
            spec, ledger, verifier, config, self.settled, clock=clock, have_voted=self._judge.have_voted
        )
        member.proofs.attach(self.examiner.examine, self.examiner.is_wanted)

    @property
    def budget(self) -> AuditBudget:
        """Processor time that audits have earned and spent."""
        return self._draw.budget

    def toss(self, route: Route) -> frozenset[str]:
        """The hops to be checked after a session over `route` that is about to open."""
        return self._draw.toss(route)

    def is_banned(self, peer_id: str) -> bool:
        """True if the ledger says so."""
        return self._ledger.is_banned(peer_id)

    def session_closed(self, session: Session, chosen: frozenset[str]) -> None:
        """Queue what the coins chose, of hops of the beginning and of those that replaced them."""
        book = session.book
        if book is None:
            return
        self._draw.budget.earn(book.work_s)
        closed = ClosedSession(book, chosen, session.broken_receipt is not None)
        try:
            self._closed_in.send_nowait(closed)
        except trio.WouldBlock:
            logger.debug("audit.dropped session=%s", book.session.hex())
        else:
            self._backlog.note_pending(1)

    async def settled(self) -> None:
        """Wait until every audit that was begun is done, and somebody else has the proofs that came of it."""
        await self.training.settled()
        await self._backlog.settled()

    async def linger(self, seconds: float) -> None:
        """Wait so long for `settled`, and longer for the confirmation of a FAIL, which others may delay."""
        with trio.move_on_after(seconds):
            await self.settled()
        with trio.move_on_after(self._config.timeout_s):
            while self._failing:
                await self._confirmed.wait()

    async def keep_nothing(self) -> None:
        """Leave no audit of our own peers to another process; those that were left here wait for a next one.

        Our own peers end with us, and those of earlier processes are not to be reached from here.
        """
        await self._backlog.close(forget=True)

    async def serve(self) -> None:
        """Do the audits, a few at once, until cancelled; what is not done by then is for the next start."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery  # of proofs that are handed out
                nursery.start_soon(self._queue_all)
                nursery.start_soon(self.training.serve)
                for _ in range(AT_ONCE):
                    nursery.start_soon(self._work)
        finally:
            with trio.CancelScope(shield=True):
                await self._backlog.close()

    async def _queue_all(self) -> None:
        """Turn sessions that closed into audits, those of earlier processes first."""
        with contained("what was left over"):
            await self._backlog.take_over()
        async for closed in self._closed:
            with contained(f"session {closed.book.session.hex()}"):
                for job in await self._jobs_of(closed):
                    await self._backlog.put(job)
            self._backlog.note_pending(-1)

    async def _jobs_of(self, closed: ClosedSession) -> list[Job]:
        """The audits of a session, of which only steps are looked at whose receipts are in order."""
        book, chosen, error = closed.book, closed.chosen, None
        try:
            # A session that a hop ends closes before its last receipts are checked.
            await book.check()
        except PeerError as exc:
            error = exc
            if exc.peer_id and not closed.was_told:
                self._blame(exc)
        if isinstance(error, Equivocation):
            return [Job(error.peer_id, contradiction=error.receipts)]
        steps = beginning_of(book.kept, self._config.max_tokens, self._config.evidence_bytes)
        # What may be its neighbour's doing is no reason to hold it against a hop that an audit has no result.
        faults = {error.peer_id: str(error)} if error and not error.told_by else {}
        return [
            Job(peer_id, steps, fault=faults.get(peer_id, ""), draw=book.draw)
            for peer_id in chosen
            if any(hop.peer_id == peer_id for each in steps for hop in each.hops)
        ]

    async def _work(self) -> None:
        while True:
            job = await self._backlog.next_job()
            published: list[bytes] | None = []
            with contained(f"the audit of {job.peer_id}"):
                published = await self._audit(job)
                self._begin_to_hand_out(published or ())
            self._failing.discard(job.peer_id)
            self._confirmed.fire()
            await self._backlog.done(job, keep=published is None)

    async def _publish(self, proof: Proof, contents: Mapping[bytes, Payload], why: str) -> None:
        """Ban, publish the proof, and see that somebody fetches it."""
        self._begin_to_hand_out(await self._accuse(proof, contents, why))

    def _begin_to_hand_out(self, proofs: Sequence[bytes]) -> None:
        for address in proofs:
            self._backlog.note_pending(1)
            self._nursery.start_soon(self._hand_out, address)

    async def _hand_out(self, address: bytes) -> None:
        with contained("a proof"), trio.move_on_after(HAND_OUT_S):
            await self._member.proofs.handed_out(address)
        self._backlog.note_pending(-1)

    async def _audit(self, job: Job) -> list[bytes] | None:
        """Do one audit; returns the proofs that were published, None if it is left to another process."""
        if not self._backlog.is_wanted(job):
            return None
        if job.contradiction:
            return await self._accuse_of_two(job.peer_id, job.contradiction)
        if self._ledger.is_banned(job.peer_id):
            return []
        collected = await collect_record(
            self._member.host,
            job.steps,
            job.peer_id,
            self._spec.hidden_size,
            max_bytes=self._config.evidence_bytes,
            max_tokens=self._config.max_tokens,
            timeout_s=self._config.timeout_s,
            line=self._line,
            is_fresh=job.is_fresh,
            was_slow=job.was_slow,
            on_slow=partial(self._backlog.note_slow, job),
            rng=self._rng,
        )
        if collected.contradiction:
            return await self._accuse_of_two(job.peer_id, collected.contradiction)
        finding, others = await self._judge.judge(
            collected.record, job.others, partial(self._failing.add, job.peer_id)
        )
        if collected.is_cut and finding.verdict is Verdict.PASS:
            finding = replace(finding, verdict=Verdict.INCONCLUSIVE)
        fault = collected.fault or job.fault if finding.verdict is Verdict.INCONCLUSIVE else ""
        if not job.is_fresh and collected.record is None and not fault:
            # Its evidence is not to be had from here, or not any more: no audit of ours.
            logger.debug("audit.left peer=%s", job.peer_id)
            return None
        if finding.verdict is not Verdict.FAIL and await self._has_lied_at_an_end(job, collected.record):
            return []
        published = await self._settle(
            Opinion(job.peer_id, collected.record, finding), fault=fault, why=fault or finding.reason
        )
        for other in others:
            published += await self._settle(other, why=other.finding.reason)
        return published

    async def _has_lied_at_an_end(self, job: Job, record: HopRecord | None) -> bool:
        """True if a hop embedded or drew something else than it should; then that is settled.

        No proof of it is published: receipts do not show it, and others find it out as this client did.
        """
        if record is None:
            return False
        claims = claims_of(job.steps, record, job.draw, self._spec.vocab_size)
        if claims is None:
            return False
        finding = await self._judge.judge_ends(record, claims)
        if finding.verdict is not Verdict.FAIL:
            logger.debug("audit.ends peer=%s %s", job.peer_id, finding.reason)
            return False
        await self._settle(Opinion(job.peer_id, None, finding), why=finding.reason)
        self._ledger.ban(job.peer_id, finding.reason, self._clock(), by="audits")
        return True

    async def _accuse_of_two(self, peer_id: str, receipts: tuple[bytes, ...]) -> list[bytes]:
        return await self._accuse(Proof(1, peer_id, "equivocation", receipts), {}, "it signed twice")

    async def _settle(self, opinion: Opinion, *, fault: str = "", why: str) -> list[bytes]:
        """Note an audit's outcome; returns the proof that was published, if it is one.

        Args:
            fault: What the hop is to blame for if there is no verdict; empty: nothing.
        """
        peer_id, finding = opinion.peer_id, opinion.finding
        self._draw.budget.count_audit()
        self._note(peer_id, finding, fault=fault, why=why)
        if finding.deviation is not None and finding.verdict is not Verdict.FAIL:
            self._ledger.record_small_lies(
                peer_id,
                sample_of(finding.deviation),
                self._clock(),
                is_short=finding.verdict is Verdict.INCONCLUSIVE and is_too_short(finding.deviation),
            )
        if finding.verdict is Verdict.PASS:
            self._judge.has_passed = True
        if finding.verdict is not Verdict.FAIL or opinion.record is None:
            return []
        if opinion.record.is_adapted or not opinion.record.is_whole:  # which would be no proof for others
            self._ledger.ban(peer_id, finding.reason, self._clock(), by="audits")
            return []
        proof = Proof(1, peer_id, "output", opinion.record.signed)
        return await self._accuse(proof, opinion.record.contents, finding.reason)

    def _note(self, peer_id: str, finding: Finding, *, fault: str = "", why: str = "") -> None:
        self.tally = self.tally.plus(finding.verdict)
        self._member.host.counts.add("audits", finding.verdict.value)
        logger.info("audited %s: %s, %s", peer_id, finding.verdict.value, finding.reason)
        self._report(AuditDone(peer_id, finding.verdict.value, finding.reason))
        self._ledger.record_audit(
            peer_id,
            finding.verdict,
            self._clock(),
            withheld=bool(fault),
            contradicted=finding.contradicted,
            why=why or finding.reason,
        )

    async def _accuse(self, proof: Proof, contents: Mapping[bytes, Payload], why: str) -> list[bytes]:
        """Ban, and let everybody see why; returns the proof's content address if it was published."""
        try:
            address = await self._member.proofs.publish(proof, contents)
        except P2PInferError as exc:
            logger.warning("the proof against %s could not be published: %s", proof.peer_id, exc)
            # What convinced us does not depend on whether others can be told.
            self._ledger.ban(proof.peer_id, why, self._clock(), by="audits")
            return []
        self._ledger.add_proof(address.hex(), proof.peer_id, self._clock(), verified=True, why=why)
        return [address]


def open_auditor(
    member: SwarmMember,
    source: ModelSource,
    ledger: Ledger,
    verifier: Verifier | None,
    config: AuditConfig,
    host_config: HostConfig,
    report: Report | None,
    kept_in: Path | None,
    blame: Callable[[PeerError], None],
    run_pass: RunPass,
    find_adapter: FindAdapter,
) -> Auditor:
    """Auditor of a client's sessions; without a `verifier` the blocks of `source` run again here."""
    return Auditor(
        member,
        source.spec,
        ledger,
        verifier or LocalVerifier(source, config),
        config,
        host_config=host_config,
        report=report,
        kept_in=kept_in,
        run_pass=run_pass,
        find_adapter=find_adapter,
        blame=blame,
    )
