"""Receipts of training: a hop's signature over each pass, its inputs, gradients and outputs.

They are chained as those of sessions are (`reputation/receipt.py`), by `sequence`, `previous` and the hop's
own nonce. The receipt of a backward pass names the inputs of the forward pass that it belongs to. So whoever
holds the tensors of one receipt, and the adapter, can run that pass again: no other receipt is needed.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import msgspec

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.numerics import Codec, Numerics
from p2pinfer.models.span import BlockSpan
from p2pinfer.reputation.receipt import NO_RECEIPT, CheckSignature, Payload, Sign, digest_of

from .messages import Block, Count, SessionId
from .train_messages import Begin, Digest

TRAIN_DOMAIN: Final = b"p2pinfer/1/train-receipt\0"
NOTHING: Final = bytes(32)  # digest of what there is none of: an adapter, a gradient
_SIGNATURE_BYTES: Final = 64


class TrainReceipt(msgspec.Struct, frozen=True, array_like=True):
    """One pass on one hop. Digests are blake3 over the payloads as they travelled."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    session: SessionId
    sequence: Count
    previous: Digest
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    start: Block
    stop: Block
    kind: Literal["forward", "backward"]
    tokens: Count
    dtype: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_]{1,16}\Z")]
    codec: Codec
    call: Digest  # of lengths, seed and what was wanted
    adapter: Digest  # zeros: none
    input: Digest  # of the positions, indices and hidden states
    gradient: Digest  # that came in; zeros for a forward pass
    output: Digest
    nonce: SessionId


@dataclass(frozen=True, slots=True)
class PassDigests:
    """Blocks of one pass, and digests by the names that they have in its receipt."""

    span: BlockSpan
    call: bytes
    adapter: bytes | None
    input: bytes
    gradient: bytes | None
    output: bytes


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(TrainReceipt)


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
        body = _encoder.encode(receipt)
        signed = body + self._sign(TRAIN_DOMAIN + body)
        self._sequence += 1
        self._previous = digest_of(signed)
        return signed


def open_train_receipt(signed: Payload, peer_id: str, check: CheckSignature) -> TrainReceipt:
    """The receipt that `peer_id` signed.

    Raises:
        ProtocolViolation: It is malformed, not in its canonical form, or the signature is not the peer's.
    """
    body, signature = bytes(signed[:-_SIGNATURE_BYTES]), bytes(signed[-_SIGNATURE_BYTES:])
    try:
        receipt = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("not a receipt of training", peer_id) from exc  # exc may quote the peer
    if _encoder.encode(receipt) != body:
        raise ProtocolViolation("a receipt that is not in its canonical form", peer_id)
    if not check(peer_id, TRAIN_DOMAIN + body, signature):
        raise ProtocolViolation("a receipt whose signature is not the hop's", peer_id)
    return receipt
