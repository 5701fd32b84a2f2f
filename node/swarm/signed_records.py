"""Signed records: an announcement's bytes with its author, so that anybody may pass them on."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.transport.identity import Identity, verify

MAX_RECORD_BYTES: Final = 16_384
# What is signed begins with this, so that a signature cannot be passed off as one over something else.
_DOMAIN: Final = b"p2pinfer/1/record\0"


class _Sealed(msgspec.Struct, frozen=True, array_like=True):
    peer_id: Annotated[str, msgspec.Meta(max_length=128)]
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[_Sealed]] = msgspec.msgpack.Decoder(_Sealed)


def seal(identity: Identity, payload: bytes) -> bytes:
    """`payload` with its author's peer id and signature."""
    return _encoder.encode(_Sealed(identity.peer_id, payload, identity.sign(_DOMAIN + payload)))


def peek_payload(record: bytes) -> bytes:
    """The payload of a record whose signature nobody has looked at yet; empty if it is malformed."""
    try:
        return _decoder.decode(record).payload
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return b""


def open_record(record: bytes) -> tuple[str, bytes]:
    """The author's peer id and the payload of a sealed record.

    Raises:
        ProtocolViolation: It is malformed, too large, or the signature is not the author's.
    """
    if len(record) > MAX_RECORD_BYTES:
        raise ProtocolViolation(f"a record of {len(record)} bytes; {MAX_RECORD_BYTES} are allowed")
    try:
        sealed = _decoder.decode(record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(f"malformed record: {exc}") from exc
    if not verify(sealed.peer_id, _DOMAIN + sealed.payload, sealed.signature):
        raise ProtocolViolation("a record whose signature is not its author's")
    return sealed.peer_id, sealed.payload
