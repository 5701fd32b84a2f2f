"""Checks of a session's receipts in a thread: signatures, chains, and outputs against inputs.

A session notes what went through the chain and goes on; what was noted is checked in a thread, a few steps at
a time, and what is wrong ends the session with an error that names the hop. A receipt that is missing or
broken says nothing of the output: it costs its hop reliability, not integrity. The steps before it stay as
good as they were, and are audited like those of any other session; what has not been checked never is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import trio

from p2pinfer.errors import Equivocation, PeerError, ProtocolViolation
from p2pinfer.models.numerics import Codec, packed_codec, parse_numerics, reference_for
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.protocol.draws import Draw, are_signed_draws
from p2pinfer.node.protocol.messages import Bill, Step
from p2pinfer.reputation.receipt import (
    CheckSignature,
    Payload,
    Receipt,
    ReceiptChain,
    Terms,
    broken_link,
    decode_receipt,
    digest_of,
    is_signed_by,
    last_of_step,
)
from p2pinfer.routing.route import Hop

OnJoined: TypeAlias = Callable[[tuple[Hop, ...]], bool]

CHECK_EVERY: Final = 16  # steps; a thread is asked once for so many


class PassedStep(NamedTuple):
    """A step that went through the whole chain and came back."""

    step: Step
    hops: tuple[Hop, ...]
    sent: Payload  # what the first hop was sent
    got: Payload  # what the last one answered
    receipts: tuple[bytes, ...]
    drawn: bytes = b""  # the last hop's signature over what it answered, if that is draws


class ReceiptBook:
    """The receipts of one session.

    Args:
        revision: Of the model, or what gives it for a hop's blocks.
        keep: Remember every step, payloads included, for an audit after the session.
        on_joined: Called with hops that replaced others; if it says so, steps are remembered from then on.
        draw: Terms of the last hop's draws; None: hidden states travel to and from the client.
        packed: Positions below this one travel packed.

    Attributes:
        unchecked: Steps that came back and were not checked yet.
        kept: Steps whose receipts were checked and are in order, oldest first.
        broken: The first thing that was wrong with a receipt. Nothing that came after it counts.
    """

    def __init__(
        self,
        session: bytes,
        revision: str | Callable[[BlockSpan], str],
        codec: Codec,
        check: CheckSignature,
        *,
        keep: bool = False,
        on_joined: OnJoined | None = None,
        draw: Draw | None = None,
        packed: int = 0,
    ) -> None:
        self.draw = draw
        self._packed = packed
        self.session = session
        self.revision = revision
        self.codec: Codec = codec
        self.unchecked: list[PassedStep] = []
        self.kept: list[PassedStep] = []
        self.broken: PeerError | None = None
        self._work_us = 0.0
        self._opened_at = time.monotonic()
        self._check_signature = check
        self._keep = keep
        self._on_joined = on_joined
        self._hops: tuple[Hop, ...] | None = None  # of the latest step
        self._chains: dict[str, ReceiptChain] = {}
        self._turn = trio.Lock()

    @property
    def work_s(self) -> float:
        """Seconds that hops say they worked on this session, and no more than have passed since it opened."""
        return min(self._work_us / 1e6, time.monotonic() - self._opened_at)

    def add(self, passed: PassedStep, bills: Sequence[Bill] = ()) -> bool:
        """Take in a step that came back; True if enough have gathered for a check."""
        if passed.hops != self._hops:
            self._note_hops(passed.hops)
        self.unchecked.append(passed)
        self._work_us += sum(_own_part_us(bill, passed.step.tokens) for bill in bills)
        return len(self.unchecked) >= CHECK_EVERY

    def _note_hops(self, hops: tuple[Hop, ...]) -> None:
        former, self._hops = self._hops, hops
        if former is None or self._on_joined is None:
            return
        known = {hop.peer_id for hop in former}
        joined = tuple(hop for hop in hops if hop.peer_id not in known)
        if joined and self._on_joined(joined):
            self._keep = True

    async def check(self) -> None:
        """Check what is `unchecked`.

        Raises:
            ProtocolViolation: A receipt is missing, malformed or forged, or does not fit its neighbours.
            Equivocation: A hop signed two of them for one step.
        """
        async with self._turn:
            steps, self.unchecked = self.unchecked, []
            if steps and self.broken is None:
                await trio.to_thread.run_sync(self._check_all, steps)
            if self.broken is not None:
                self.unchecked = []
                raise self.broken

    def _check_all(self, steps: Sequence[PassedStep]) -> None:
        for passed in steps:
            try:
                self._check_one(passed)
            except PeerError as exc:
                self.broken = exc
                return
            if self._keep:
                self.kept.append(passed)

    def _check_one(self, passed: PassedStep) -> None:
        self._check_handing_on(passed)
        try:
            self._check_receipts(passed)
        except Equivocation:
            raise
        except ProtocolViolation as exc:
            # What stands in a receipt that its hop did not sign says nothing of those before it: whoever made
            # it up may have made those up as well.
            self._check_signatures(passed, str(exc))
            raise

    def _check_receipts(self, passed: PassedStep) -> None:
        """Check what the receipts of a step say, one for each hop."""
        hops, step = passed.hops, passed.step
        receipts = [self._extend(passed, index) for index in range(len(hops))]
        for index, (hop, receipt) in enumerate(zip(hops, receipts, strict=True)):
            is_last = index == len(hops) - 1
            # An audit allows for the rounding of what is packed, and for none of what is not.
            is_rounded = step.position < self._packed and not is_last
            due = packed_codec(self.codec) if is_rounded else self.codec
            if receipt.returned != (step.returns if is_last else step.tokens) or receipt.codec != due:
                raise ProtocolViolation(f"a receipt for another step than {step.number}", hop.peer_id)
            # Or a hop could open in bfloat16 and sign for what no audit can run again.
            if reference_for(parse_numerics(receipt.dtype)) is None:
                raise ProtocolViolation(
                    f"a receipt of step {step.number} that cannot be checked", hop.peer_id
                )
            # Or it could announce bfloat16, compute in four bits, and pass every audit of those.
            if hop.dtype and receipt.dtype != hop.dtype:
                raise ProtocolViolation(
                    f"a receipt of step {step.number} in {receipt.dtype}, where {hop.dtype} was announced",
                    hop.peer_id,
                )
        sent, got = digest_of(passed.sent), digest_of(passed.got)
        if self.draw is not None:  # ids went in, and draws came out
            sent, got = receipts[0].input, receipts[-1].output
            self._check_draws(self.draw, passed)
        blamed = broken_link(receipts, sent, got)
        if blamed is not None:
            raise ProtocolViolation(
                f"the receipts of step {step.number} do not link up", hops[blamed].peer_id
            )

    def _check_draws(self, draw: Draw, passed: PassedStep) -> None:
        last, signed, number = passed.hops[-1].peer_id, passed.receipts[-1], passed.step.number
        check, drawn = self._check_signature, passed.drawn
        if passed.step.returns and not are_signed_draws(draw, signed, passed.got, drawn, last, check):
            raise ProtocolViolation(f"draws of step {number} that their hop did not sign", last)

    def _check_handing_on(self, passed: PassedStep) -> None:
        """Check that each hop handed on the receipts that the hops before it signed.

        A hop takes in no receipts that do not name each other, down to one that names none. So if those that
        came back do not, the last hop made them so, whomever they seem to speak against.
        """
        hops, receipts, number = passed.hops, passed.receipts, passed.step.number
        try:
            is_whole = last_of_step(receipts) is not None
        except ProtocolViolation:
            is_whole = False
        if not is_whole:
            raise ProtocolViolation(
                f"step {number} came back with receipts that do not name each other", hops[-1].peer_id
            )
        if len(receipts) == len(hops):
            return
        count = f"step {number} came back with {len(receipts)} receipts from {len(hops)} hops"
        self._check_signatures(passed, count)
        # Whoever signed the first one left out those before it, or the first hop made some up.
        raise ProtocolViolation(count, hops[max(0, len(hops) - len(receipts))].peer_id)

    def _check_signatures(self, passed: PassedStep, complaint: str) -> None:
        """Check that all receipts bear their hops' signatures, from the last one on.

        One that does not was made by its hop or by the next one, which named it: none of them checks others'.
        """
        for hop, signed in zip(reversed(passed.hops), reversed(passed.receipts), strict=False):
            if not is_signed_by(signed, hop.peer_id, self._check_signature):
                raise ProtocolViolation(complaint, hop.peer_id, told_by=_behind(passed.hops, hop))

    def _extend(self, passed: PassedStep, index: int) -> Receipt:
        """Content of a hop's next receipt.

        What a hop signed speaks against it alone, unless it is of another place: the next hop has those too,
        and may hand one on instead, which it would refuse to take in if it was honest.
        """
        hops, signed = passed.hops, passed.receipts[index]
        hop, behind = hops[index], _behind(hops, hops[index])
        receipt, step = decode_receipt(signed), passed.step
        place = (receipt.session, receipt.stop, receipt.position, receipt.tokens, receipt.epoch)
        if place != (self.session, hop.span.stop, step.position, step.tokens, step.epoch):
            raise ProtocolViolation(f"a receipt for another step than {step.number}", behind or hop.peer_id)
        chain = self._chain_of(hop)
        try:
            return chain.extend(signed)
        except Equivocation:
            raise
        except ProtocolViolation as exc:
            if chain.has_passed(receipt):
                exc.told_by = behind
            raise

    def _chain_of(self, hop: Hop) -> ReceiptChain:
        """Receipt chain of a hop; where it was replaced by another peer, that one's chain begins."""
        if hop.peer_id not in self._chains:
            revision = self.revision if isinstance(self.revision, str) else self.revision(hop.span)
            terms = Terms(self.session, revision, hop.span.start, hop.span.stop, self.codec)
            self._chains[hop.peer_id] = ReceiptChain(hop.peer_id, terms, self._check_signature)
        return self._chains[hop.peer_id]


def _own_part_us(bill: Bill, tokens: int) -> float:
    """Part of a hop's work that was for this step: not its queue, nor other sessions' tokens of the batch."""
    beside = max(0, bill.serve_us - bill.queue_us - bill.compute_us)
    return beside + bill.compute_us * tokens / max(tokens, bill.batch_tokens)


def _behind(hops: Sequence[Hop], hop: Hop) -> str:
    """The next hop's peer id; empty if there is none."""
    at = hops.index(hop)
    return hops[at + 1].peer_id if at + 1 < len(hops) else ""
