"""Record of one pass of training: its receipt and everything that it names, ready to be run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.compute.architecture import Architecture
from p2pinfer.models.learning.adapter import Adapter
from p2pinfer.models.learning.span_passes import Microbatch
from p2pinfer.models.numerics import Numerics, parse_numerics, row_bytes
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.train_passes import TrainedPass
from p2pinfer.node.protocol.train_messages import Update
from p2pinfer.node.protocol.train_tensors import (
    adapter_content,
    call_content,
    decode_adapter_content,
    decode_call_content,
    decode_inputs,
    decode_values,
    decode_vector,
    layout_of,
)
from p2pinfer.reputation.receipt import Payload, digest_of
from p2pinfer.reputation.train_receipt import NOTHING, TrainReceipt

MAX_RANK = 1024  # of an update; whoever made a proof may have signed for any


@dataclass(frozen=True, slots=True)
class PassRecord:
    """A hop's receipt of a pass, and payloads by digest.

    Every payload has the digest that it stands under; who makes a record sees to that.
    """

    peer_id: str
    signed: bytes
    receipt: TrainReceipt
    contents: Mapping[bytes, Payload]

    @property
    def span(self) -> BlockSpan:
        """Blocks that were to be run."""
        return BlockSpan(self.receipt.start, self.receipt.stop)

    @property
    def numerics(self) -> Numerics | None:
        """Numerics that the hop names; None if this version does not know them."""
        return parse_numerics(self.receipt.dtype)

    @property
    def others(self) -> tuple[bytes, ...]:
        """Digests of contents that the receipt names through other ones: the adapter's values.

        Raises:
            ProtocolViolation: The adapter's description is missing, or is none.
        """
        if self.receipt.adapter == NOTHING:
            return ()
        return (decode_adapter_content(self.contents.get(self.receipt.adapter, b""))[1],)

    @property
    def size(self) -> int:
        """Bytes of all payloads."""
        return sum(map(len, self.contents.values()))


@dataclass(frozen=True, slots=True)
class PassHistory:
    """A pass, and what came of it.

    Attributes:
        hidden: (tokens, hidden_size), the outputs, or the gradient of the inputs; None if it was not wanted.
        vector: (size,), the gradient of the adapter; None where there was none.
    """

    asked: TrainedPass
    hidden: Tensor | None
    vector: Tensor | None


def contents_of(
    lengths: tuple[int, ...],
    seed: int,
    adapter: tuple[tuple[Update, ...], int, Payload] | None,
    payloads: tuple[Payload, ...],
    *,
    wants_hidden: bool,
) -> dict[bytes, Payload]:
    """Contents of a record, by digest.

    Args:
        adapter: Updates, tokens of the prompt, and values.
        payloads: Inputs, gradient and output, as they travelled.
    """
    parts: list[Payload] = [call_content(lengths, seed, wants_hidden=wants_hidden), *payloads]
    if adapter is not None:
        updates, prompt_tokens, values = adapter
        parts += [adapter_content(updates, prompt_tokens, digest_of(values)), values]
    return {digest_of(each): each for each in parts}


def pass_of(record: PassRecord, architecture: Architecture, *, max_tokens: int) -> PassHistory:
    """Put a record together.

    Args:
        max_tokens: Of the microbatch.

    Raises:
        ProtocolViolation: Contents are missing or not finite, or do not fit each other. It says nothing of
            the hop: whoever asked for the pass chose inputs and adapter, and took no such results.
    """
    receipt, size, codec = record.receipt, architecture.hidden_size, record.receipt.codec
    call = decode_call_content(_content(record, receipt.call))
    tokens = sum(call.lengths)
    if tokens != receipt.tokens or tokens > max_tokens:
        raise ProtocolViolation(f"a microbatch of {tokens} tokens, where {receipt.tokens} are signed for")
    adapter = None if receipt.adapter == NOTHING else _adapter(record, architecture)
    gradient: Tensor | None = None
    try:
        rows, hidden = decode_inputs(bytearray(_content(record, receipt.input)), call.lengths, size, codec)
        if receipt.kind == "backward":
            gradient = decode_values(bytearray(_content(record, receipt.gradient)), tokens, size, codec)
        batch = Microbatch(record.span, rows, adapter, call.seed)
        asked = TrainedPass(batch, hidden, gradient, call.wants_hidden)
        return PassHistory(asked, *_returned(record, asked, size))
    except WrongOutput as exc:
        raise ProtocolViolation(f"tensors that cannot be: {exc}") from exc


def _returned(
    record: PassRecord, asked: TrainedPass, hidden_size: int
) -> tuple[Tensor | None, Tensor | None]:
    receipt, tokens, adapter = record.receipt, asked.batch.rows.tokens, asked.batch.adapter
    payload = bytearray(_content(record, receipt.output))
    if asked.gradient is None:
        return decode_values(payload, tokens, hidden_size, receipt.codec, record.peer_id), None
    bytes_ = tokens * row_bytes(hidden_size, receipt.codec) if asked.wants_hidden else 0
    hidden = None
    if asked.wants_hidden:
        hidden = decode_values(payload[:bytes_], tokens, hidden_size, receipt.codec, record.peer_id)
    values = 0 if adapter is None else len(adapter.values)
    vector = decode_vector(payload[bytes_:], values, record.peer_id)
    return hidden, None if adapter is None else vector


def _adapter(record: PassRecord, architecture: Architecture) -> Adapter:
    head, digest = decode_adapter_content(_content(record, record.receipt.adapter))
    layout = layout_of(head.updates, head.prompt_tokens)
    if any(each.rank > MAX_RANK for each in layout.updates):
        raise ProtocolViolation(f"an adapter of a rank above {MAX_RANK}")
    # Prompts lie in the vector by the blocks of the session, which are those of the pass as far as can be
    # seen. Updates say for themselves which block they are for.
    span = record.span if head.prompt_tokens else BlockSpan(0, len(architecture.windows))
    try:
        values = decode_vector(bytearray(_content(record, digest)), layout.size(architecture, span))
        return Adapter(layout, values, architecture, span)
    except (ValueError, WrongOutput) as exc:
        raise ProtocolViolation(f"an adapter that cannot be: {exc}") from exc


def _content(record: PassRecord, digest: bytes) -> Payload:
    content = record.contents.get(digest)
    if content is None:
        raise ProtocolViolation("a part of the pass is missing")
    return content
