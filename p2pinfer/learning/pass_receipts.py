"""Calls to hops, and the receipts that have to answer them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.pass_record import PassRecord
from p2pinfer.node.host.network import Network
from p2pinfer.node.protocol.span_adapter import SpanAdapter
from p2pinfer.node.protocol.tensors import dtype_of
from p2pinfer.node.protocol.train_messages import Begin
from p2pinfer.node.protocol.train_tensors import adapter_content, call_content, digest_of_call
from p2pinfer.reputation.receipt import NO_RECEIPT, Payload, digest_of
from p2pinfer.reputation.train_receipt import NOTHING, TrainReceipt, open_train_receipt


@dataclass(frozen=True, slots=True)
class Call:
    """A microbatch for one hop.

    Attributes:
        span: The blocks to run, all among the hop's.
        rows: The sequences.
        inputs: Positions, indices and hidden states as they travel.
        adapter: The hop's part of the adapter.
        seed: Of dropout; 0: none.
    """

    span: BlockSpan
    rows: Rows
    inputs: bytes
    adapter: SpanAdapter | None
    seed: int

    def hidden(self, codec: Codec) -> Tensor:
        """The hidden states among the inputs, (tokens, hidden_size), as a copy."""
        encoded = bytearray(memoryview(self.inputs)[8 * self.rows.tokens :])
        return torch.frombuffer(encoded, dtype=dtype_of(codec)).view(self.rows.tokens, -1)


@dataclass(frozen=True, slots=True)
class Expected:
    """Content that the receipt of a pass has to have."""

    kind: Literal["forward", "backward"]
    call: Call
    wants_hidden: bool
    output: bytes
    gradient: bytes


def record_of(
    peer_id: str, signed: bytes, receipt: TrainReceipt, expected: Expected, gradient: Payload, output: Payload
) -> PassRecord:
    """Everything about a pass whose receipt is in order, for whoever runs it again; nothing is copied."""
    call = expected.call
    head = call_content(call.rows.lengths, call.seed, wants_hidden=expected.wants_hidden)
    contents: dict[bytes, Payload] = {
        receipt.call: head,
        receipt.input: call.inputs,
        receipt.output: output,
    }
    if expected.kind == "backward":
        contents[receipt.gradient] = gradient
    if call.adapter is not None:
        adapter = call.adapter
        contents[adapter.values] = adapter.payload
        contents[receipt.adapter] = adapter_content(adapter.updates, adapter.prompt_tokens, adapter.values)
    return PassRecord(peer_id, signed, receipt, contents)


class PassReceipts:
    """A hop's receipts in one session. Used in threads, by one at a time per receipt."""

    def __init__(self, peer_id: str, begin: Begin, dtype: str, host: Network) -> None:
        self._peer_id = peer_id
        self._begin = begin
        self._dtype = dtype
        self._host = host
        self._signed: dict[int, bytes] = {}  # digest by place in the chain
        self._nonce: bytes | None = None

    def check(self, signed: bytes, expected: Expected) -> TrainReceipt:
        """The receipt, if it is about this pass, of this session, and signed by the hop.

        Raises:
            ProtocolViolation: It is not.
        """
        receipt = open_train_receipt(signed, self._peer_id, self._host.verify)
        call, begin = expected.call, self._begin
        said = (receipt.session, receipt.revision, receipt.codec, receipt.dtype, receipt.kind)
        asked = (begin.session, begin.revision, begin.codec, self._dtype, expected.kind)
        digests = (receipt.call, receipt.adapter, receipt.input, receipt.gradient, receipt.output)
        adapter = NOTHING if call.adapter is None else call.adapter.digest
        wanted = digest_of_call(call.rows.lengths, call.seed, wants_hidden=expected.wants_hidden)
        held = (wanted, adapter, digest_of(call.inputs), expected.gradient, expected.output)
        span = (receipt.start, receipt.stop, receipt.tokens)
        if said != asked or digests != held or span != (call.span.start, call.span.stop, call.rows.tokens):
            raise ProtocolViolation(
                "a receipt for another pass than the one that was asked for", self._peer_id
            )
        if (receipt.sequence == 0) != (receipt.previous == NO_RECEIPT):
            raise ProtocolViolation("a chain of receipts that begins in the middle", self._peer_id)
        self._check_place(receipt, digest_of(signed))
        return receipt

    def _check_place(self, receipt: TrainReceipt, digest: bytes) -> None:
        """Hold a receipt against those beside it that have come: answers are checked in threads."""
        if self._nonce is None:
            self._nonce = receipt.nonce
        before = self._signed.get(receipt.sequence - 1)
        if receipt.nonce != self._nonce or self._signed.setdefault(receipt.sequence, digest) != digest:
            raise ProtocolViolation("receipts of two chains in one session", self._peer_id)
        if before is not None and receipt.previous != before:
            raise ProtocolViolation(
                f"receipt {receipt.sequence} does not follow from the one before", self._peer_id
            )
