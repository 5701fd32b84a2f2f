"""Outbox of a session: a receipt, a bill and a copy for each computed step, and its way to whom it is for.

A step goes to the successor, and from the last hop as a `Result` to the client. One with `replay` comes from
somebody's log and stops here or a few hops on, where whoever feeds us is told that it has arrived; what it
leaves behind is the cache and the log of a session that never broke.
"""

from __future__ import annotations

import time

import msgspec
import trio

from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.protocol.messages import Bill, Open, Result
from p2pinfer.node.protocol.replay_log import ReplayLog
from p2pinfer.reputation.receipt import SignedStep, StandingSteps

from .forward import StepWork
from .inbox import Inbox
from .lifetime import Lifetime
from .neighbours import Neighbours
from .receipt_signer import ReceiptSigner, SignedReceipt


class Outbox:
    """Sends the steps of one session in the order in which they were computed.

    Attributes:
        sender: Where computed steps are put; it holds as many as may be in flight.
        replay: What has gone to the successor; None on the last hop, which has nobody to replay to.
        tokens_computed: Of all steps that have come by here.
        standing: The steps that were signed for and not rolled back.
    """

    def __init__(
        self,
        opening: Open,
        neighbours: Neighbours,
        inbox: Inbox,
        lifetime: Lifetime,
        *,
        signer: ReceiptSigner,
        evidence: EvidenceStore,
        replay: ReplayLog | None,
        max_steps: int,
    ) -> None:
        """An outbox; `inbox` is told of every step that has left."""
        self.replay = replay
        self.tokens_computed = 0
        self.standing = StandingSteps()
        self._opening = opening
        self._neighbours = neighbours
        self._inbox = inbox
        self._lifetime = lifetime
        self._signer = signer
        self._evidence = evidence
        self.sender, self._receiver = trio.open_memory_channel[StepWork](max_steps)

    async def send_computed(self) -> None:
        """Send what is computed, in order, until cancelled.

        Raises:
            PeerVanished: The client is gone. A successor that is gone is reported to the client instead.
            ProtocolViolation: A step is not what its predecessor has signed for.
        """
        async for work in self._receiver:
            if work.output is not None:
                await self._send(work)
            # Steps that were dropped count as well, or a client that rolls back often would seem to exceed
            # its limits.
            self._inbox.let_go(work.room_bytes)

    def close(self) -> None:
        """Give the replay log back. Nothing may be put in any more."""
        self.sender.close()
        if self.replay is not None:
            self.replay.release()

    async def _send(self, work: StepWork) -> None:
        step, payload, neighbours = work.step, work.sent, self._neighbours
        self.tokens_computed += 0 if step.kept else step.tokens
        self._lifetime.last_active = trio.current_time()
        successor = self._opening.successor
        returned = step.returns if successor is None else step.tokens
        signed = await self._attest(work, returned)
        receipts = (*step.receipts, signed.receipt)
        bills = (*step.bills, _bill(work))
        # Before it is sent: what a successor has and the log has not could not be replayed to another one.
        if self.replay is not None:
            self.replay.append(step.position, step.tokens, payload)
        if step.replay == 1 or (step.replay and successor is None):
            await neighbours.confirm_to(work.feeder, step.number)
        elif successor is None:
            draws = b""
            if work.drawn:
                payload, draws = work.drawn, self._signer.sign_draws(signed.receipt_digest, work.drawn)
            elif self._opening.draw is not None:
                payload = b""
            result = Result(step.number, step.epoch, step.returns, bills, receipts, draws)
            if not neighbours.control.send_now(result, payload):
                await neighbours.control.send(result, payload)
        else:
            replay = max(0, step.replay - 1)
            if step.kept:  # the successor has it
                payload = b""
            elif work.wire:
                payload = work.wire
            onward = msgspec.structs.replace(step, bills=bills, receipts=receipts, replay=replay)
            link = neighbours.link
            # Nothing suspends between this look and the frame, so nobody changes the link in between.
            if (
                link is None
                or neighbours.pausing.is_held
                or step.epoch < neighbours.least_epoch
                or not link.send_now(onward, payload)
            ):
                await neighbours.send_to_successor(onward, payload)

    async def _attest(self, work: StepWork, returned: int) -> SignedReceipt:
        """Our receipt for a step; what it names is kept for whoever may want to check it."""
        if work.feeder is not self._neighbours.control:
            self._signer.predecessor = work.feeder.peer_id
        signed = await self._signer.attest(work.step, work.received, work.sent, returned)
        contents = (
            (signed.receipt_digest, signed.receipt),
            (signed.input_digest, work.received),
            (signed.output_digest, work.sent),
        )
        self._evidence.add(self._opening.session, contents, trio.current_time())
        step = work.step
        self.standing.add(SignedStep(step.position, step.tokens, signed.input_digest, signed.output_digest))
        return signed


def _bill(work: StepWork) -> Bill:
    report = work.report
    return Bill(
        max(0, int((report.started_at - work.submitted_at) * 1e6)),
        max(0, int(report.compute_s * 1e6)),
        max(0, int((time.perf_counter() - work.submitted_at) * 1e6)),
        report.tokens,
    )
