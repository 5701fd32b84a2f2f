"""Fraud proofs: evidence that a peer lied, which a third party can check by itself.

A proof names the peer and carries its own signed receipts. Two of them for one place in a chain are a lie in
themselves. A chain from its first receipt on, together with the tensors that it names, lets anybody run the
blocks again and compare; so does one receipt of a pass of training. The tensors travel by content address,
apart from the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.numerics import unpacked_codec

from .receipt import (
    MAX_RECEIPT_BYTES,
    CheckSignature,
    Receipt,
    ReceiptChain,
    Terms,
    contradict,
    decode_receipt,
    digest_of,
    open_receipt,
    standing_steps,
)
from .train_receipt import NOTHING, TrainReceipt, open_train_receipt

ProofKind: TypeAlias = Literal["output", "equivocation", "training"]

MAX_PROOF_BYTES: Final = 1 << 22
BACKWARD_WEIGHT: Final = 4  # runs of the blocks that a pass back takes, and its forward pass
MAX_RECEIPTS: Final = 8192
_EMPTY: Final = digest_of(b"")


class Proof(msgspec.Struct, frozen=True, array_like=True):
    """An accusation that anybody can check."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)]
    peer_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]  # who is accused
    kind: ProofKind
    receipts: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_RECEIPT_BYTES)], ...],
        msgspec.Meta(min_length=1, max_length=MAX_RECEIPTS),
    ]
    others: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)], ...], msgspec.Meta(max_length=1)
    ] = ()  # digests of tensors that receipts name through others: an adapter's values


@dataclass(frozen=True, slots=True)
class Accusation:
    """A proof whose signatures and chain are in order; whether the outputs are wrong is still to be seen."""

    peer_id: str
    kind: ProofKind
    receipts: tuple[Receipt, ...]  # none where it is about training
    signed: tuple[bytes, ...]  # the same, as they travelled
    training: TrainReceipt | None = None
    others: tuple[bytes, ...] = ()

    @property
    def revisions(self) -> frozenset[str]:
        """Models that its receipts are about: one, if it proves anything."""
        if self.training is not None:
            return frozenset((self.training.revision,))
        return frozenset(receipt.revision for receipt in self.receipts)

    @property
    def revision(self) -> str:
        """The model it is about."""
        return self.receipts[0].revision if self.training is None else self.training.revision

    @property
    def extent(self) -> tuple[int, int]:
        """Rows of all inputs, and blocks of the span: what a re-execution takes grows with both."""
        if self.kind == "equivocation":
            return 0, 0
        if self.training is not None:
            weight = BACKWARD_WEIGHT if self.training.kind == "backward" else 1
            return weight * self.training.tokens, self.training.stop - self.training.start
        first = self.receipts[0]
        return sum(receipt.tokens for receipt in self.receipts), first.stop - first.start

    @property
    def contents(self) -> tuple[bytes, ...]:
        """Digests of the tensors that are needed to run the blocks again; none for an equivocation."""
        if self.kind == "equivocation":
            return ()
        if self.training is not None:
            return (*self.training.contents, *self.others)
        return tensors_of(self.receipts)


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Proof)


def tensors_of(receipts: Sequence[Receipt]) -> tuple[bytes, ...]:
    """The digests of the inputs and outputs that stand at the end, each once.

    What a later step rolled back is not computed again, so nobody has to hold it. Of what is empty there is
    nothing to fetch.
    """
    digests = dict.fromkeys(
        digest
        for standing in standing_steps(receipts)
        for digest in (standing.receipt.input, standing.receipt.output)
    )
    return tuple(digest for digest in digests if digest != _EMPTY)


def encode_proof(proof: Proof) -> bytes:
    """The proof as it is addressed by its blake3, kept and fetched."""
    return _encoder.encode(proof)


def decode_proof(encoded: bytes) -> Proof:
    """The proof in `encoded`; nothing of it is checked yet.

    Raises:
        ProtocolViolation: The bytes are no proof, or too many.
    """
    if len(encoded) > MAX_PROOF_BYTES:
        raise ProtocolViolation(f"a proof of {len(encoded)} bytes; {MAX_PROOF_BYTES} are allowed")
    try:
        return _decoder.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("not a proof") from exc


def open_proof(proof: Proof, check: CheckSignature) -> Accusation:
    """Content of a proof, once its signatures hold. Takes 50 us a receipt.

    Raises:
        ProtocolViolation: A receipt is not the accused peer's, or they are no chain from its beginning.
    """
    if proof.kind == "equivocation":
        return _open_equivocation(proof, check)
    if proof.kind == "training":
        return _open_training(proof, check)
    receipts: list[Receipt] = []
    first = decode_receipt(proof.receipts[0])
    codec = unpacked_codec(first.codec)
    terms = Terms(first.session, first.revision, first.start, first.stop, codec)
    chain = ReceiptChain(proof.peer_id, terms, check, whole=True)
    for signed in proof.receipts:
        receipts.append(chain.extend(signed))
    return Accusation(proof.peer_id, "output", tuple(receipts), proof.receipts)


def _open_training(proof: Proof, check: CheckSignature) -> Accusation:
    if len(proof.receipts) != 1:
        raise ProtocolViolation("more receipts of training than one")
    receipt = open_train_receipt(proof.receipts[0], proof.peer_id, check)
    if (receipt.adapter != NOTHING) != bool(proof.others):
        raise ProtocolViolation("a proof without the adapter's values, or with values of none")
    return Accusation(proof.peer_id, "training", (), proof.receipts, receipt, proof.others)


def _open_equivocation(proof: Proof, check: CheckSignature) -> Accusation:
    receipts = tuple(open_receipt(signed, proof.peer_id, check) for signed in proof.receipts)
    if len(receipts) != 2 or not contradict(*receipts):
        raise ProtocolViolation("receipts that do not contradict each other")
    return Accusation(proof.peer_id, "equivocation", receipts, proof.receipts)
