"""A hop's end of a session of training: it signs for each pass (`reputation/train_receipt.py`)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal

from p2pinfer.models.numerics import Numerics
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.receipt import NO_RECEIPT, Sign, digest_of
from p2pinfer.reputation.train_receipt import NOTHING, TrainReceipt, sign_train_receipt

from .train_messages import Begin


@dataclass(frozen=True, slots=True)
class PassDigests:
    """Blocks of one pass, and digests by the names that they have in its receipt."""

    span: BlockSpan
    call: bytes
    adapter: bytes | None
    input: bytes
    gradient: bytes | None
    output: bytes


class TrainSigner:
    """The hop's end of one session's chain of receipts."""

    def __init__(self, opening: Begin, numerics: Numerics, sign: Sign) -> None:
        self._opening = opening
        self._dtype = str(numerics)
        self._sign = sign
        self._nonce = secrets.token_bytes(16)
        self._sequence = 0
        self._previous = NO_RECEIPT

    def attest(self, kind: Literal["forward", "backward"], tokens: int, digests: PassDigests) -> bytes:
        """The signed receipt of the next pass."""
        opening = self._opening
        receipt = TrainReceipt(
            version=1,
            session=opening.session,
            sequence=self._sequence,
            previous=self._previous,
            revision=opening.revision,
            start=digests.span.start,
            stop=digests.span.stop,
            kind=kind,
            tokens=tokens,
            dtype=self._dtype,
            codec=opening.codec,
            call=digests.call,
            adapter=digests.adapter or NOTHING,
            input=digests.input,
            gradient=digests.gradient or NOTHING,
            output=digests.output,
            nonce=self._nonce,
        )
        signed = sign_train_receipt(receipt, self._sign)
        self._sequence += 1
        self._previous = digest_of(signed)
        return signed
