"""Receipts of training: a hop's signature over each pass, its inputs, gradients and outputs.

They are chained as those of sessions are (`receipt.py`), by `sequence`, `previous` and the hop's own nonce.
The receipt of a backward pass names the inputs of the forward pass that it belongs to. So whoever holds the
tensors of one receipt, and the adapter, can run that pass again: no other receipt is needed.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.numerics import Codec

from .receipt import MAX_RECEIPT_BYTES, CheckSignature, Payload, Sign

TRAIN_DOMAIN: Final = b"p2pinfer/1/train-receipt\0"
NOTHING: Final = bytes(32)  # digest of what there is none of: an adapter, a gradient
_SIGNATURE_BYTES: Final = 64

_Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Id: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Block: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]


class TrainReceipt(msgspec.Struct, frozen=True, array_like=True):
    """One pass on one hop. Digests are blake3 over the payloads as they travelled."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    session: _Id
    sequence: _Count
    previous: _Digest
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    start: _Block
    stop: _Block
    kind: Literal["forward", "backward"]
    tokens: _Count
    dtype: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_]{1,16}\Z")]
    codec: Codec
    call: _Digest  # of lengths, seed and what was wanted
    adapter: _Digest  # zeros: none
    input: _Digest  # of the positions, indices and hidden states
    gradient: _Digest  # that came in; zeros for a forward pass
    output: _Digest
    nonce: _Id

    @property
    def contents(self) -> tuple[bytes, ...]:
        """Digests of what it takes to run the pass again, each once."""
        named = (self.call, self.adapter, self.input, self.gradient, self.output)
        return tuple(digest for digest in dict.fromkeys(named) if digest != NOTHING)


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(TrainReceipt)


def sign_train_receipt(receipt: TrainReceipt, sign: Sign) -> bytes:
    """The receipt as it travels."""
    body = _encoder.encode(receipt)
    return body + sign(TRAIN_DOMAIN + body)


def open_train_receipt(signed: Payload, peer_id: str, check: CheckSignature) -> TrainReceipt:
    """The receipt that `peer_id` signed.

    Raises:
        ProtocolViolation: It is malformed, not in its canonical form, or the signature is not the peer's.
    """
    if not _SIGNATURE_BYTES < len(signed) <= MAX_RECEIPT_BYTES:
        raise ProtocolViolation(f"a receipt of {len(signed)} bytes", peer_id)
    body, signature = bytes(signed[:-_SIGNATURE_BYTES]), bytes(signed[-_SIGNATURE_BYTES:])
    try:
        receipt = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("not a receipt of training", peer_id) from exc  # exc may quote the peer
    if _encoder.encode(receipt) != body:
        raise ProtocolViolation("a receipt that is not in its canonical form", peer_id)
    if receipt.start >= receipt.stop or (receipt.kind == "forward") != (receipt.gradient == NOTHING):
        raise ProtocolViolation("a receipt over nothing", peer_id)
    if not check(peer_id, TRAIN_DOMAIN + body, signature):
        raise ProtocolViolation("a receipt whose signature is not the hop's", peer_id)
    return receipt
