"""Checks of a session's receipts in a thread: signatures, chains, and outputs against inputs.

A session notes what went through the chain and goes on; what was noted is checked in a thread, a few steps at
a time, and what is wrong ends the session with an error that names the hop. A receipt that is missing or
broken says nothing of the output: it costs its hop reliability, not integrity. The steps before it stay as
good as they were, and are audited like those of any other session; what has not been checked never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import trio

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.models.numerics import parse_numerics, reference_for
from p2pinfer.node.protocol.messages import Step
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
)
from p2pinfer.routing.route import Hop

CHECK_EVERY: Final = 16  # steps; a thread is asked once for so many


class PassedStep(NamedTuple):
    """A step that went through the whole chain and came back."""

    step: Step
    hops: tuple[Hop, ...]
    sent: Payload  # what the first hop was sent
    got: Payload  # what the last one answered
    receipts: tuple[bytes, ...]


class ReceiptBook:
    """The receipts of one session.

    Args:
        keep: Remember every step, payloads included, for an audit after the session.

    Attributes:
        unchecked: Steps that came back and were not checked yet. Whoever sees one come back adds it, and has
            them checked when there are `CHECK_EVERY`.
        kept: Steps whose receipts were checked and are in order, oldest first.
        broken: The first thing that was wrong with a receipt. Nothing that came after it counts.
    """

    def __init__(
        self, session: bytes, revision: str, codec: str, check: CheckSignature, *, keep: bool = False
    ) -> None:
        self.session = session
        self.revision = revision
        self.codec = codec
        self.unchecked: list[PassedStep] = []
        self.kept: list[PassedStep] = []
        self.broken: PeerError | None = None
        self._check_signature = check
        self._keep = keep
        self._chains: dict[str, ReceiptChain] = {}
        self._turn = trio.Lock()

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
        hops, step = passed.hops, passed.step
        if len(passed.receipts) != len(hops):
            raise _missing(passed)
        receipts = [self._extend(hops, index, signed) for index, signed in enumerate(passed.receipts)]
        for index, (hop, receipt) in enumerate(zip(hops, receipts, strict=True)):
            returned = step.returns if index == len(hops) - 1 else step.tokens
            said = (receipt.position, receipt.tokens, receipt.returned, receipt.epoch)
            if said != (step.position, step.tokens, returned, step.epoch):
                raise ProtocolViolation(f"a receipt for another step than {step.number}", hop.peer_id)
            # Or a hop could open in bfloat16 and sign for what no audit can run again.
            if reference_for(parse_numerics(receipt.dtype)) is None:
                raise ProtocolViolation(
                    f"a receipt of step {step.number} that cannot be checked", hop.peer_id
                )
        blamed = broken_link(receipts, digest_of(passed.sent), digest_of(passed.got))
        if blamed is not None:
            raise ProtocolViolation(
                f"the receipts of step {step.number} do not link up", hops[blamed].peer_id
            )

    def _extend(self, hops: Sequence[Hop], index: int, signed: bytes) -> Receipt:
        """Content of a hop's next receipt.

        What a hop signed speaks against it alone. Bytes that it did not sign may as well be the work of those
        behind it, through whose hands they went: then it is the next hop's word.
        """
        hop = hops[index]
        try:
            return self._chain_of(hop).extend(signed)
        except ProtocolViolation as exc:
            if not is_signed_by(signed, hop.peer_id, self._check_signature):
                exc.told_by = _behind(hops, hop)
            raise

    def _chain_of(self, hop: Hop) -> ReceiptChain:
        """Receipt chain of a hop; where it was replaced by another peer, that one's chain begins."""
        if hop.peer_id not in self._chains:
            terms = Terms(self.session, self.revision, hop.span.start, hop.span.stop, self.codec)
            self._chains[hop.peer_id] = ReceiptChain(hop.peer_id, terms, self._check_signature)
        return self._chains[hop.peer_id]


def _missing(passed: PassedStep) -> ProtocolViolation:
    """Last hop without a receipt, which is the one that left it out as far as anybody can tell."""
    spans: set[tuple[int, int]] = set()
    for signed in passed.receipts:
        receipt: Receipt | None = _decoded(signed)
        if receipt is not None:
            spans.add((receipt.start, receipt.stop))
    absent = [hop for hop in passed.hops if (hop.span.start, hop.span.stop) not in spans]
    blamed = absent[-1] if absent else passed.hops[-1]
    count = f"{len(passed.receipts)} receipts from {len(passed.hops)} hops"
    # It left its receipt out, or one behind it did.
    return ProtocolViolation(
        f"step {passed.step.number} came back with {count}",
        blamed.peer_id,
        told_by=_behind(passed.hops, blamed),
    )


def _behind(hops: Sequence[Hop], hop: Hop) -> str:
    """The next hop's peer id; empty if there is none."""
    at = hops.index(hop)
    return hops[at + 1].peer_id if at + 1 < len(hops) else ""


def _decoded(signed: bytes) -> Receipt | None:
    try:
        return decode_receipt(signed)
    except ProtocolViolation:
        return None
