"""Payloads of training, and the digests by which adapters and passes are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
import torch
from torch import Tensor

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.learning.adapter import AdapterLayout, LowRank
from p2pinfer.models.learning.rows import Rows
from p2pinfer.models.numerics import Codec, row_bytes
from p2pinfer.reputation.receipt import Payload, digest_of

from .tensors import check_finite, encode_hidden, view_hidden
from .train_messages import Lengths, Update, Updates

MAX_POSITION: Final = 1 << 24
_INDEX_BYTES: Final = 8  # a position and an index, int32 each
_VALUE_BYTES: Final = 4
_DIGEST_BYTES: Final = 32


def input_bytes(tokens: int, hidden_size: int, codec: Codec) -> int:
    """Size of the inputs of so many tokens."""
    return tokens * (_INDEX_BYTES + row_bytes(hidden_size, codec))


def encode_inputs(rows: Rows, hidden: Tensor, codec: Codec) -> bytes:
    """Inputs of a microbatch: positions, indices, hidden states."""
    numbers = torch.stack((rows.positions, rows.indices)).to("cpu", torch.int32).contiguous()
    return numbers.numpy().tobytes() + encode_hidden(hidden, codec)


def decode_inputs(
    payload: bytearray, lengths: Sequence[int], hidden_size: int, codec: Codec, peer_id: str = ""
) -> tuple[Rows, Tensor]:
    """Sequences and hidden states, (tokens, hidden_size), in `payload`, whose memory they share.

    Raises:
        ProtocolViolation: The payload's length is not theirs.
        WrongOutput: Values are not finite, or positions make no sense.
    """
    tokens = sum(lengths)
    expected = input_bytes(tokens, hidden_size, codec)
    if len(payload) != expected:
        raise ProtocolViolation(f"{len(payload)} bytes for {tokens} tokens: {expected} expected", peer_id)
    numbers = torch.frombuffer(payload, dtype=torch.int32, count=2 * tokens).view(2, tokens).long()
    positions, indices = numbers[0], numbers[1]
    if int(numbers.min()) < 0 or int(numbers.max()) >= MAX_POSITION:
        raise WrongOutput(f"positions that are not among 0 to {MAX_POSITION}", peer_id)
    # Every sequence rises; between two of them there may be anything.
    is_first = torch.zeros(tokens, dtype=torch.bool)
    is_first[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    if not bool(((indices[1:] > indices[:-1]) | is_first[1:]).all()):
        raise WrongOutput("the tokens of a sequence are not in their order", peer_id)
    return Rows(lengths, positions, indices), decode_values(
        payload[tokens * _INDEX_BYTES :], tokens, hidden_size, codec, peer_id
    )


def decode_values(
    payload: bytearray, tokens: int, hidden_size: int, codec: Codec, peer_id: str = ""
) -> Tensor:
    """Hidden states or their gradient, (tokens, hidden_size).

    Raises:
        ProtocolViolation: The payload's length is not theirs.
        WrongOutput: Some are not finite.
    """
    values = view_hidden(payload, tokens, hidden_size, codec, peer_id)
    check_finite(payload, codec, peer_id)
    return values


def encode_vector(values: Tensor) -> bytes:
    """An adapter's values, or their gradient, as float32."""
    return encode_hidden(values.view(1, -1), "float32")


def decode_vector(payload: bytearray, size: int, peer_id: str = "") -> Tensor:
    """(size,) float32, which shares the payload's memory.

    Raises:
        ProtocolViolation: The payload's length is not theirs.
        WrongOutput: Some are not finite.
    """
    if len(payload) != size * _VALUE_BYTES:
        raise ProtocolViolation(
            f"{len(payload)} bytes for {size} values of an adapter: {size * _VALUE_BYTES} expected", peer_id
        )
    if not size:
        return torch.empty(0)
    check_finite(payload, "float32", peer_id)
    return torch.frombuffer(payload, dtype=torch.float32)


def updates_of(layout: AdapterLayout) -> tuple[Update, ...]:
    """A layout's updates as they travel."""
    return tuple(
        Update(each.block, each.projection, each.rank, each.scale, each.dropout) for each in layout.updates
    )


def layout_of(updates: Sequence[Update], prompt_tokens: int) -> AdapterLayout:
    """The layout that an `Adapt` describes."""
    return AdapterLayout(
        tuple(LowRank(each.block, each.projection, each.rank, each.scale, each.dropout) for each in updates),
        prompt_tokens,
    )


class AdapterHead(msgspec.Struct, frozen=True, array_like=True):
    """Layout of an adapter, as its digest covers it."""

    updates: Updates
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]


class CallHead(msgspec.Struct, frozen=True, array_like=True):
    """Part of a request that a receipt does not spell out."""

    lengths: Lengths
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    wants_hidden: bool


_adapters: Final = msgspec.msgpack.Decoder(AdapterHead)
_calls: Final = msgspec.msgpack.Decoder(CallHead)


def adapter_content(updates: Sequence[Update], prompt_tokens: int, values: bytes) -> bytes:
    """Content whose digest names an adapter: its layout, then the digest of its values."""
    return msgspec.msgpack.encode((tuple(updates), prompt_tokens)) + values


def decode_adapter_content(content: Payload) -> tuple[AdapterHead, bytes]:
    """Layout of an adapter, and the digest of its values.

    Raises:
        ProtocolViolation: It is no such content.
    """
    try:
        return _adapters.decode(bytes(content[:-_DIGEST_BYTES])), bytes(content[-_DIGEST_BYTES:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("no description of an adapter") from exc


def digest_of_adapter(updates: Sequence[Update], prompt_tokens: int, values: Payload) -> bytes:
    """Digest of an adapter: of its layout, a MessagePack array, followed by the digest of its values."""
    return digest_of(adapter_content(updates, prompt_tokens, digest_of(values)))


def call_content(lengths: Sequence[int], seed: int, *, wants_hidden: bool) -> bytes:
    """Content whose digest stands in a receipt for what that does not spell out of a request."""
    return msgspec.msgpack.encode((tuple(lengths), seed, wants_hidden))


def decode_call_content(content: Payload) -> CallHead:
    """Lengths, seed, and what was wanted.

    Raises:
        ProtocolViolation: It is no such content.
    """
    try:
        return _calls.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("no description of a pass") from exc


def digest_of_call(lengths: Sequence[int], seed: int, *, wants_hidden: bool) -> bytes:
    """Digest of what a receipt does not spell out of a request."""
    return digest_of(call_content(lengths, seed, wants_hidden=wants_hidden))
