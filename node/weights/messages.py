"""Requests for weights and their answers, as one MessagePack array behind a big-endian u32 length each.

Requests name contents by hash. What follows `sending` are so many bytes of them.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias, cast

import msgspec

from p2pinfer.errors import CheckpointError, ProtocolViolation
from p2pinfer.models.pieces.chunks import MAX_CHUNKS, ChunkList
from p2pinfer.models.pieces.manifest import (
    MAX_FILE_BYTES,
    MAX_NUMBERS,
    MAX_SHARDS,
    MAX_TEXT_BYTES,
    Manifest,
    SmallFile,
    WeightFile,
)

WEIGHTS_PROTOCOL: Final = "/p2pinfer/weights/1.0.0"
MAX_REQUEST_BYTES: Final = 1_024
MAX_ANSWER_BYTES: Final = 9 << 20  # a list of `MAX_CHUNKS`
MAX_RUN: Final = 64  # chunks of one request
_MAX_TEXTS: Final = 16

_Hash: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=220)]
DenialCode: TypeAlias = Literal["unknown", "later", "changed", "relayed"]


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """An array whose first element is the name of the message."""


class Find(_Message, frozen=True, tag="find"):
    """Asks what a model of this revision consists of."""

    revision: Annotated[str, msgspec.Meta(min_length=32, max_length=32)]


class Chunks(_Message, frozen=True, tag="chunks"):
    """Asks for the digests of a file's chunks."""

    sha256: _Hash


class Get(_Message, frozen=True, tag="get"):
    """Asks for some chunks of a file, one after the other."""

    sha256: _Hash
    first: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHUNKS)]
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_RUN)]


class Small(_Message, frozen=True, tag="small"):
    """Asks for a small file."""

    digest: _Hash


class Knock(_Message, frozen=True, tag="knock"):
    """Asks for a port at which chunks are sent without encryption."""


class Weight(msgspec.Struct, frozen=True, array_like=True):
    """A weight file, and if the peer has it."""

    name: _Name
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_FILE_BYTES)]
    sha256: _Hash
    held: bool


class Words(msgspec.Struct, frozen=True, array_like=True):
    """A small file, which the peer has."""

    name: _Name
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_TEXT_BYTES)]
    digest: _Hash


class Found(_Message, frozen=True, tag="found"):
    """Contents of a model."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    numbers: Annotated[str, msgspec.Meta(max_length=MAX_NUMBERS)]
    weights: Annotated[tuple[Weight, ...], msgspec.Meta(min_length=1, max_length=MAX_SHARDS)]
    texts: Annotated[tuple[Words, ...], msgspec.Meta(max_length=_MAX_TEXTS)]


class Listed(_Message, frozen=True, tag="listed"):
    """The digests of a file's chunks."""

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_FILE_BYTES)]
    digests: Annotated[bytes, msgspec.Meta(max_length=32 * MAX_CHUNKS)]


class Sending(_Message, frozen=True, tag="sending"):
    """Announces so many bytes of contents."""

    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_TEXT_BYTES)]


class Door(_Message, frozen=True, tag="door"):
    """A port that is open for who shows this token; 0 if there is none."""

    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    token: Annotated[bytes, msgspec.Meta(max_length=32)]


class Denied(_Message, frozen=True, tag="denied"):
    """Instead of an answer."""

    code: DenialCode
    seconds: Annotated[float, msgspec.Meta(ge=0, le=600)]


Request: TypeAlias = Find | Chunks | Get | Small | Knock
Answer: TypeAlias = Found | Listed | Sending | Door | Denied

_encoder: Final = msgspec.msgpack.Encoder()
_requests: Final[Any] = msgspec.msgpack.Decoder(Request)
_answers: Final[Any] = msgspec.msgpack.Decoder(Answer)


def encode(message: Request | Answer) -> bytes:
    """The message behind its length."""
    content = _encoder.encode(message)
    return len(content).to_bytes(4, "big") + content


def decode_request(encoded: bytes) -> Request:
    """Raises ProtocolViolation for anything that is no request."""
    return cast(Request, _decoded(_requests, encoded, "request for weights"))


def decode_answer(encoded: bytes) -> Answer:
    """Raises ProtocolViolation for anything that is no answer."""
    return cast(Answer, _decoded(_answers, encoded, "answer about weights"))


def _decoded(decoder: Any, encoded: bytes, what: str) -> Any:
    try:
        return decoder.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(f"malformed {what}") from exc


def manifest_of(found: Found, revision: str) -> Manifest:
    """Contents of the model, if they are what `revision` stands for.

    Raises:
        ProtocolViolation: It is not.
    """
    manifest = Manifest(
        "".join(each if each.isprintable() else "?" for each in found.model),
        found.numbers,
        tuple(WeightFile(each.name, each.size, each.sha256.hex()) for each in found.weights),
        tuple(SmallFile(each.name, each.size, each.digest.hex()) for each in found.texts),
    )
    try:
        manifest.check()
    except CheckpointError as exc:
        raise ProtocolViolation(str(exc)) from exc
    if manifest.revision != revision:
        raise ProtocolViolation("hashes of another model than was asked for")
    return manifest


def chunks_of(listed: Listed) -> ChunkList:
    """The list.

    Raises:
        ProtocolViolation: It has not a digest for each chunk.
    """
    chunks = ChunkList(listed.size, listed.digests)
    if not chunks.is_whole:
        raise ProtocolViolation(f"{len(listed.digests)} bytes of digests for a file of {listed.size} bytes")
    return chunks
