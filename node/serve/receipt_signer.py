"""Signer of one session's receipts on one hop.

Small payloads are hashed where they are: a decode step of 8 KB takes 5 us, and a thread would take twenty
times that to be asked. What is larger is hashed in a thread, in which blake3 lets go of the interpreter.
"""

from __future__ import annotations

import secrets
from typing import Final, NamedTuple

import trio

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.numerics import Numerics, packed_codec
from p2pinfer.node.protocol.draws import sign_draws
from p2pinfer.node.protocol.messages import Open, Step
from p2pinfer.reputation.receipt import (
    NO_RECEIPT,
    RECEIPT_VERSION,
    Payload,
    Receipt,
    Sign,
    digest_of,
    last_of_step,
    sign_receipt,
)

INLINE_BYTES: Final = 1 << 16  # 20 us of hashing at most, on the event loop


class SignedReceipt(NamedTuple):
    """A signed receipt, its own digest, and those of the two payloads that it names."""

    receipt: bytes
    receipt_digest: bytes
    input_digest: bytes
    output_digest: bytes


class ReceiptSigner:
    """The hop's end of one chain of receipts; its steps come in the order in which they were computed.

    Attributes:
        predecessor: The hop that they come from; None is the client. It may change while the session runs.
    """

    def __init__(self, opening: Open, numerics: Numerics, sign: Sign) -> None:
        self.predecessor = opening.predecessor
        self._opening = opening
        self._dtype = str(numerics)
        self._sign = sign
        self._nonce = secrets.token_bytes(16)
        self._sequence = 0
        self._previous = NO_RECEIPT

    async def attest(self, step: Step, received: Payload, sent: Payload, returned: int) -> SignedReceipt:
        """The receipt for a step that took in `received` and gives out `sent`, `returned` rows of it.

        Raises:
            ProtocolViolation: What was received is not what the predecessor signed for, or the receipts of
                the hops before do not name each other.
        """
        if len(received) + len(sent) <= INLINE_BYTES:
            digests = digest_of(received), digest_of(sent)
        else:
            digests = await trio.to_thread.run_sync(lambda: (digest_of(received), digest_of(sent)))
        self._compare_with_predecessor(step, digests[0])
        opening = self._opening
        is_packed = step.position < opening.packed and opening.successor is not None
        receipt = Receipt(
            version=RECEIPT_VERSION,
            session=opening.session,
            sequence=self._sequence,
            previous=self._previous,
            revision=opening.revision,
            start=opening.start,
            stop=opening.stop,
            position=step.position,
            tokens=step.tokens,
            returned=returned,
            epoch=step.epoch,
            dtype=self._dtype,
            codec=packed_codec(opening.codec) if is_packed else opening.codec,
            input=digests[0],
            output=digests[1],
            nonce=self._nonce,
            received=digest_of(step.receipts[-1]) if step.receipts else NO_RECEIPT,
        )
        signed = sign_receipt(receipt, self._sign)
        self._sequence += 1
        self._previous = digest_of(signed)
        return SignedReceipt(signed, self._previous, *digests)

    def sign_draws(self, receipt_digest: bytes, payload: Payload) -> bytes:
        """Our signature for draws from what a receipt of ours names as output."""
        assert self._opening.draw is not None
        return sign_draws(self._opening.draw, receipt_digest, payload, self._sign)

    def _compare_with_predecessor(self, step: Step, received: bytes) -> None:
        """Check that the predecessor signed what it sent, or the blame for its output would be ours.

        So would that for receipts of hops before it, which it had to check in the same way.
        """
        predecessor = self.predecessor
        if predecessor is None or (step.replay and not step.receipts):
            return
        try:
            last = last_of_step(step.receipts)
        except ProtocolViolation:
            last = None
        due = (self._opening.session, self._opening.start, step.position, step.tokens, step.epoch, received)
        if last is None or due != (
            last.session,
            last.stop,
            last.position,
            last.tokens,
            last.epoch,
            last.output,
        ):
            raise ProtocolViolation(f"step {step.number} is not what its receipt says", predecessor)
