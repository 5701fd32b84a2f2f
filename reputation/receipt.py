"""Receipts: a hop's signature over each step's input, output and everything it signed before.

    receipt of the hop before        receipt of this hop             receipt of the step before
      output: blake3  ── equals ──>    input: blake3
          <── blake3 of all of it ──   received
                                       previous: blake3  ── of ──>     session, nonce, sequence - 1

The digests fix what was done before anyone knows whether it will be looked at; `previous` binds each step to
the history it attended to; session, revision, span and positions say what should have been computed. So a
wrong output is a lie that can be shown to third parties. A hop that signs two different receipts for one
place in a chain has lied to one of their holders, whatever it computed.

`received` says which bytes a hop was given as the receipt of the hop before it. A step comes with the
receipts of all hops before, and a hop takes none in whose receipts do not name each other. So the hops behind
cannot change or drop one unnoticed: what does not fit is the work of the last hop that handed it on.

The nonce is the hop's own and new for every session it lets in. A chain that the client named alone could be
opened twice under one name, and the hop's honest receipts would look like two for one place.

Canonical form: a MessagePack array of the fields in order, followed by the 64-byte Ed25519 signature over
`p2pinfer/2/receipt`, a zero byte, and that array. What does not encode back to the very same bytes is none.
Signatures are made and checked by functions that are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple, TypeAlias

import msgspec
from blake3 import blake3

from p2pinfer.errors import Equivocation, ProtocolViolation
from p2pinfer.models.numerics import Codec, PackedCodec, unpacked_codec

RECEIPT_VERSION: Final = 2
MAX_RECEIPT_BYTES: Final = 1024
DOMAIN: Final = b"p2pinfer/2/receipt\0"
NO_RECEIPT: Final = bytes(32)  # `previous` of a chain's first receipt, `received` of a route's first hop
_SIGNATURE_BYTES: Final = 64

Payload: TypeAlias = bytes | bytearray | memoryview
Sign: TypeAlias = Callable[[bytes], bytes]
CheckSignature: TypeAlias = Callable[[str, bytes, bytes], bool]  # (peer id, what was signed, signature)

_Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Id: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Block: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    """One step on one hop. Digests are blake3 over the payloads, as they are when unpacked."""

    version: Annotated[int, msgspec.Meta(ge=RECEIPT_VERSION, le=RECEIPT_VERSION)]
    session: _Id
    sequence: _Count  # 0, 1, 2 ... in the order in which this hop computed
    previous: _Digest  # blake3 of the signed receipt before; zeros for the first
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    start: _Block
    stop: _Block
    position: _Count  # of the input's first token
    tokens: _Count  # rows of the input
    returned: _Count  # rows of the output: the last ones; all of them but on a route's last hop
    epoch: _Count
    dtype: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_]{1,16}\Z")]  # the hop's numerics, as text
    codec: Codec | PackedCodec  # the latter where the output was rounded to be packed
    input: _Digest
    output: _Digest
    nonce: _Id  # the hop's own, one for each chain
    # blake3 of the signed receipt of the hop before, as it came; zeros where none came with the step
    received: _Digest = NO_RECEIPT


@dataclass(frozen=True, slots=True)
class Terms:
    """Fields that every receipt of one hop in one session must carry."""

    session: bytes
    revision: str
    start: int
    stop: int
    codec: str


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Receipt)


def digest_of(payload: Payload) -> bytes:
    """The 32 bytes by which a payload, or a signed receipt, is named."""
    return blake3(payload).digest()


def sign_receipt(receipt: Receipt, sign: Sign) -> bytes:
    """The receipt as it travels."""
    body = _encoder.encode(receipt)
    return body + sign(DOMAIN + body)


def decode_receipt(signed: Payload) -> Receipt:
    """Content of a signed receipt; the signature is not looked at.

    Raises:
        ProtocolViolation: The bytes are no receipt in its canonical form.
    """
    if not _SIGNATURE_BYTES < len(signed) <= MAX_RECEIPT_BYTES:
        raise ProtocolViolation(f"a receipt of {len(signed)} bytes")
    body = bytes(signed[:-_SIGNATURE_BYTES])
    try:
        receipt = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("not a receipt") from exc  # exc may quote the peer
    if _encoder.encode(receipt) != body:
        raise ProtocolViolation("a receipt that is not in its canonical form")
    if receipt.start >= receipt.stop or receipt.returned > receipt.tokens:
        raise ProtocolViolation("a receipt over nothing")
    return receipt


def is_signed_by(signed: Payload, peer_id: str, check: CheckSignature) -> bool:
    """True if `peer_id` signed these bytes as a receipt."""
    body, signature = bytes(signed[:-_SIGNATURE_BYTES]), bytes(signed[-_SIGNATURE_BYTES:])
    return check(peer_id, DOMAIN + body, signature)


def open_receipt(signed: Payload, peer_id: str, check: CheckSignature) -> Receipt:
    """The receipt that `peer_id` signed.

    Raises:
        ProtocolViolation: It is malformed, or the signature is not the peer's.
    """
    try:
        receipt = decode_receipt(signed)
    except ProtocolViolation as exc:
        exc.peer_id = peer_id
        raise
    if not is_signed_by(signed, peer_id, check):
        raise ProtocolViolation("a receipt whose signature is not the hop's", peer_id)
    return receipt


class ReceiptChain:
    """The receipts of one hop in one session, held against each other as they come.

    Steps that a later epoch superseded may be missing: a hop further on dropped them, and their receipts with
    them. So may those of a replay, by which a hop that joins later is fed under a later epoch. Nothing else
    may: a chain of the first epoch begins at 0.

    Args:
        whole: True if nothing may be missing at all, as in a proof.
    """

    def __init__(self, peer_id: str, terms: Terms, check: CheckSignature, *, whole: bool = False) -> None:
        self.peer_id = peer_id
        self._terms = terms
        self._check = check
        self._whole = whole
        self._last: Receipt | None = None
        self._last_signed = b""

    def extend(self, signed: bytes) -> Receipt:
        """Take in the next receipt.

        Raises:
            ProtocolViolation: It is malformed, forged, about something else, or does not follow.
            Equivocation: It stands where another one of the same chain stands.
        """
        receipt = open_receipt(signed, self.peer_id, self._check)
        codec = unpacked_codec(receipt.codec)
        said = Terms(receipt.session, receipt.revision, receipt.start, receipt.stop, codec)
        if said != self._terms:
            raise ProtocolViolation("a receipt for another session, model or span", self.peer_id)
        last = self._last
        if last is not None:
            self._check_follows(receipt, signed, last)
        if (receipt.sequence == 0) != (receipt.previous == NO_RECEIPT):
            raise ProtocolViolation("a chain of receipts that begins in the middle", self.peer_id)
        if last is None and receipt.sequence and (self._whole or not receipt.epoch):
            # Nothing can have superseded what came before. A hop that began at 1 could hand out anything as
            # its receipt 0 when asked for it, and no audit would have a result.
            raise ProtocolViolation(f"a chain of receipts that begins at {receipt.sequence}", self.peer_id)
        self._last, self._last_signed = receipt, signed
        return receipt

    def has_passed(self, receipt: Receipt) -> bool:
        """True if the chain has come past the place of this one, so that others may have kept a copy."""
        return self._last is not None and receipt.sequence <= self._last.sequence

    def _check_follows(self, receipt: Receipt, signed: bytes, last: Receipt) -> None:
        if contradict(last, receipt):
            raise Equivocation(
                f"two receipts for step {receipt.sequence} of one session",
                self.peer_id,
                (self._last_signed, signed),
            )
        if (receipt.nonce, receipt.dtype) != (last.nonce, last.dtype) or receipt.epoch < last.epoch:
            raise ProtocolViolation("receipts of two chains in one session", self.peer_id)
        skipped = receipt.sequence - last.sequence - 1
        if skipped < 0 or (skipped and (self._whole or receipt.epoch == last.epoch)):
            raise ProtocolViolation(
                f"receipt {receipt.sequence} came after receipt {last.sequence}", self.peer_id
            )
        if not skipped and receipt.previous != digest_of(self._last_signed):
            raise ProtocolViolation(
                f"receipt {receipt.sequence} does not follow from the one before", self.peer_id
            )


@dataclass(frozen=True, slots=True)
class StandingStep:
    """A step of which the positions from the receipt's first up to `stop` were not rolled back."""

    receipt: Receipt
    stop: int


def standing_steps(receipts: Iterable[Receipt]) -> list[StandingStep]:
    """Steps that stand after all of these, by ascending positions: a step rolls back to its position."""
    standing: list[StandingStep] = []
    for receipt in receipts:
        while standing and standing[-1].stop > receipt.position:
            last = standing.pop()
            if last.receipt.position < receipt.position:
                standing.append(StandingStep(last.receipt, receipt.position))
        standing.append(StandingStep(receipt, receipt.position + receipt.tokens))
    return standing


class SignedStep(NamedTuple):
    """A step that a hop signed for: its place, and the digests of what came in and went out."""

    position: int
    tokens: int
    input: bytes
    output: bytes


class StandingSteps:
    """Steps of a session that no later one has rolled back, by ascending positions."""

    def __init__(self) -> None:
        self._steps: list[SignedStep] = []

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self._steps[-1].position + self._steps[-1].tokens if self._steps else 0

    def add(self, step: SignedStep) -> None:
        """Add a step, which rolls back what begins at its position or later."""
        while self._steps and self._steps[-1].position >= step.position:
            self._steps.pop()
        self._steps.append(step)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[SignedStep, int]]:
        """Each step, and how many of its rows stand: the next one may begin within it."""
        ends = [*(each.position for each in self._steps[1:]), self.stop]
        return ((each, end - each.position) for each, end in zip(self._steps, ends, strict=True))


def contradict(one: Receipt, other: Receipt) -> bool:
    """True if these two of one signer prove fraud: one place in one chain, and not the same words."""
    places = [(each.session, each.nonce, each.sequence) for each in (one, other)]
    return places[0] == places[1] and one != other


def last_of_step(signed: Sequence[Payload]) -> Receipt | None:
    """The last receipt of one step's, which are one a hop in the route's order.

    None if there is none, or if one does not name the receipt that its hop was given.

    Raises:
        ProtocolViolation: One of them is no receipt.
    """
    last: Receipt | None = None
    for index, each in enumerate(signed):
        last = decode_receipt(each)
        if last.received != (digest_of(signed[index - 1]) if index else NO_RECEIPT):
            return None
    return last


def broken_link(receipts: list[Receipt], sent: bytes, got: bytes) -> int | None:
    """The index of the hop to blame where what was handed over is not what was taken; None if all fit.

    A hop refuses input that differs from what its predecessor signed, so one that signed for such an input is
    itself to blame, not its predecessor.

    Args:
        receipts: Of one step, one a hop, in the route's order.
        sent: Digest of what the first hop was sent.
        got: Digest of what came back from the last one.
    """
    handed = sent
    for index, receipt in enumerate(receipts):
        if receipt.input != handed:
            return index
        handed = receipt.output
    return None if handed == got else len(receipts) - 1
