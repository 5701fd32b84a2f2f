"""Snapshot of a neighbour's table, or of the part that the asker lacks, in one round trip.

Whoever asks names the records it has, by eight bytes each, and is sent the others: a newcomer all of them, so
that it need not wait for gossip. It hands over the latest of its own, which gossip may have lost. Notices of
fraud proofs are among the answer. An answer may be a million times as large as its question, so there are few
at a time, and those who ask much get the rest later (`Answers`). Request and response are each one
MessagePack value behind a big-endian u32 length; see docs/wire.md. Every record is checked as one from gossip
would be. How old it is, is the neighbour's word: it may make a record seem younger than it is, by one
lifetime at most.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Annotated, Final

import msgspec
import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.host.answers import (
    GRACE_S,
    LEAST_BYTES_PER_S,
    PIECE_BYTES,
    Allowance,
    AnswerLimits,
    Answers,
)
from p2pinfer.node.host.length_prefix import receive_value, send_value
from p2pinfer.node.host.network import Network
from p2pinfer.node.transport.peer_stream import PeerStream

from .live_table import LiveTable, announcement_by
from .proof_gossip import MAX_TOLD, Heard, ProofCarrier, decode_notice, is_notice
from .signed_records import MAX_RECORD_BYTES, open_record

logger = logging.getLogger(__name__)

SNAPSHOT_PROTOCOL: Final = "/p2pinfer/snapshot/1.0.0"
MAX_RECORDS: Final = 1000
MAX_RESPONSE_BYTES: Final = 1 << 21
TAG_BYTES: Final = 8  # that stand for a record the asker has
MAX_TAGS: Final = 4096  # as many records as a table holds
MAX_REQUEST_BYTES: Final = 1 << 16
_ARRAY_BYTES: Final = 3  # before the entries of a response
_ENTRY_BYTES: Final = (
    13  # of one, beside its record: an array's byte, up to three of a length, nine of a number
)
# A newcomer takes a table once, of 2 MB at most, and a few kilobytes a minute from then on. A bootstrap node
# gives whole tables to a dozen newcomers a second, of 100 peers each.
LIMITS: Final = AnswerLimits(
    peer=Allowance(turns=2, burst_bytes=2 * MAX_RESPONSE_BYTES, bytes_per_s=32 << 10),
    address_range=Allowance(turns=8, burst_bytes=4 * MAX_RESPONSE_BYTES, bytes_per_s=256 << 10),
    everybody=Allowance(turns=64, burst_bytes=4 * MAX_RESPONSE_BYTES, bytes_per_s=1 << 20),
)
_QUESTION_S: Final = 10.0  # for a request to come
_PACED_S: Final = 2.0  # that an answer may wait for its budgets; what is beyond that is left out


class _Request(msgspec.Struct, frozen=True, array_like=True):
    revision: Annotated[str, msgspec.Meta(max_length=64)] | None  # None: of every model
    known: Annotated[bytes, msgspec.Meta(max_length=TAG_BYTES * MAX_TAGS)] = b""  # tags of what the asker has
    own: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)] = b""  # what the asker announced last


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
    age_s: Annotated[float, msgspec.Meta(ge=0)]


_Response = Annotated[list[_Entry], msgspec.Meta(max_length=MAX_RECORDS)]

_encoder: Final = msgspec.msgpack.Encoder()
_requests: Final[msgspec.msgpack.Decoder[_Request]] = msgspec.msgpack.Decoder(_Request)
_responses: Final[msgspec.msgpack.Decoder[list[_Entry]]] = msgspec.msgpack.Decoder(_Response)


def serve_snapshots(host: Network, view: LiveTable, proofs: ProofCarrier | None = None) -> None:
    """Answer whoever asks for our table, and for notices of the proofs that we hold, from now on."""

    answers = Answers(LIMITS)

    async def answer(stream: PeerStream) -> None:
        with answers.turn(stream) as answer:
            with trio.move_on_after(_QUESTION_S) as patience:
                request = decode_request(await receive_value(stream, MAX_REQUEST_BYTES))
            if patience.cancelled_caught:
                raise PeerVanished("asked for a snapshot and did not say of what", stream.peer_id)
            if request.own:
                _take_own(view, stream.peer_id, request.own)
            records = without(_of_interest(stream.peer_id, request.revision), request.known)
            fitting = _fitting(records, min(MAX_RESPONSE_BYTES, answer.bytes_within(_PACED_S)))
            size = _encoded_size(fitting)
            await answer.send(4 + size, (size.to_bytes(4, "big"), *_encoded(fitting)))

    def _of_interest(peer_id: str, revision: str | None) -> list[tuple[bytes, float]]:
        records = _records(view, proofs, revision)
        # What we remember of the asker, expired or not: it may have lost count of its announcements.
        said = {record for record, _ in records}
        return [*(each for each in view.records_of(peer_id) if each[0] not in said), *records]

    host.serve(SNAPSHOT_PROTOCOL, answer)


async def fetch_snapshot(
    host: Network,
    view: LiveTable,
    peer_id: str,
    revision: str | None = None,
    proofs: ProofCarrier | None = None,
    *,
    confirm: bool = False,
) -> int:
    """Take in what we lack of a connected peer's table; returns how many of its announcements were news.

    Args:
        revision: Of the model asked about; None is every one.
        proofs: Hears the notices of proofs that came with it, `MAX_TOLD` at most.
        confirm: Ask also for what only one neighbour has told of, to see if this one does.

    Raises:
        PeerError: The peer is gone, does not answer in time, or answers nonsense.
    """
    try:
        with trio.fail_after(GRACE_S) as patience:
            latest = patience.deadline

            def be_patient(received: int) -> None:
                patience.deadline = (
                    latest + received / LEAST_BYTES_PER_S
                )  # a thin line takes a minute for 1 MB

            async with aclosing(await host.open_stream(peer_id, SNAPSHOT_PROTOCOL)) as stream:
                known = tags(view.well_known(revision) if confirm else _records(view, proofs, revision))
                await send_value(stream, _encoder.encode(_Request(revision, known, view.latest_own())))
                entries = decode_response(await receive_value(stream, MAX_RESPONSE_BYTES, be_patient))
    except trio.TooSlowError as exc:
        raise PeerVanished(f"no snapshot in {GRACE_S:g} s, or a very slow one", peer_id) from exc
    except ProtocolViolation as exc:
        exc.peer_id = peer_id
        raise
    news = notices = 0
    for record, age_s in entries:
        try:
            author, payload = open_record(record)
            if not is_notice(payload):
                news += view.accept(announcement_by(author, payload), record, age_s, peer_id)
            elif proofs and notices < MAX_TOLD:
                notices += 1
                proofs.hear(Heard(decode_notice(payload), author, record, told_by=peer_id))
        except ProtocolViolation as exc:
            logger.debug("snapshot.bad_record peer=%s why=%s", peer_id, exc)
        await trio.lowlevel.checkpoint()  # 1000 signatures take a tenth of a second
    return news


def _take_own(view: LiveTable, peer_id: str, record: bytes) -> None:
    """Take in what the asker says of itself, as if gossip had brought it.

    Raises:
        ProtocolViolation: It is malformed, forged, or about somebody else.
    """
    author, payload = open_record(record)
    if author != peer_id:
        raise ProtocolViolation("handed over another peer's record as its own", peer_id)
    view.accept(announcement_by(author, payload), record, told_by=peer_id)


def _records(view: LiveTable, proofs: ProofCarrier | None, revision: str | None) -> list[tuple[bytes, float]]:
    """Records of this process, notices of proofs first: a response has room for only so much."""
    return [*(proofs.records(revision) if proofs else ()), *view.records(revision)]


def tags(records: Iterable[tuple[bytes, float]]) -> bytes:
    """Short tags that stand for these records in a request."""
    return b"".join(_tag(record) for record, _ in islice(records, MAX_TAGS))


def _tag(record: bytes) -> bytes:
    return hashlib.blake2b(record, digest_size=TAG_BYTES).digest()


def without(records: list[tuple[bytes, float]], known: bytes) -> list[tuple[bytes, float]]:
    """Records that `known` has no tag of."""
    if not known:
        return records
    has = {known[at : at + TAG_BYTES] for at in range(0, len(known), TAG_BYTES)}
    return [(record, age_s) for record, age_s in records if _tag(record) not in has]


def encode_response(records: Sequence[tuple[bytes, float]]) -> bytes:
    """The first records, as many as fit a response."""
    return b"".join(_encoded(_fitting(records, MAX_RESPONSE_BYTES)))


def _fitting(records: Sequence[tuple[bytes, float]], max_bytes: int) -> list[_Entry]:
    entries: list[_Entry] = []
    left = max_bytes - _ARRAY_BYTES
    for record, age_s in records[:MAX_RECORDS]:
        left -= len(record) + _ENTRY_BYTES
        if left < 0:
            break
        entries.append(_Entry(record, max(age_s, 0.0)))
    return entries


def _encoded(entries: Sequence[_Entry]) -> Iterator[bytes]:
    """MessagePack of `entries` in pieces, each made when it is asked for.

    Like `_encoder.encode(entries)`, which would hold all of it for as long as the asker does not read.
    """
    # array 16 stores an array of up to 65535 elements: 0xdc, a big-endian u16. -- MessagePack, array format
    piece = bytearray(b"\xdc" + len(entries).to_bytes(2, "big"))
    for entry in entries:
        piece += _encoder.encode(entry)
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def _encoded_size(entries: Sequence[_Entry]) -> int:
    return _ARRAY_BYTES + sum(
        _ENTRY_BYTES - (len(entry.record) < 256) + len(entry.record) for entry in entries
    )


def decode_request(encoded: bytes) -> _Request:
    """Raises ProtocolViolation for anything that is no request."""
    try:
        return _requests.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(f"malformed snapshot request: {exc}") from exc


def decode_response(encoded: bytes) -> list[tuple[bytes, float]]:
    """Raises ProtocolViolation for anything that is no response."""
    try:
        entries = _responses.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(f"malformed snapshot: {exc}") from exc
    return [(entry.record, entry.age_s) for entry in entries if math.isfinite(entry.age_s)]
