"""Every decoder of what peers say of each other, what belongs into it, and what must hold whatever comes.

A target takes any bytes and returns; it raises only when a decoder did something that it must not: another
error than the one it promises, two meanings for one signature, a value out of its bounds. Signatures are
stood in for by a rule that an attacker can satisfy, since one may sign any nonsense with a key of one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from p2pinfer.errors import LocalError, ProtocolViolation, WrongOutput
from p2pinfer.models.configs.numbers import revision_digest, weights_digest
from p2pinfer.models.pieces.chunks import CHUNK_BYTES
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.evidence.hop_record import HopRecord, history_of
from p2pinfer.node.evidence.store import MAX_DIGESTS, decode_answer, decode_ask
from p2pinfer.node.swarm.proof_gossip import Notice, decode_notice, encode_notice
from p2pinfer.node.swarm.signed_records import open_record
from p2pinfer.node.swarm.snapshot import decode_request, decode_response, encode_response
from p2pinfer.node.transport.identity import verify
from p2pinfer.node.weights.messages import (
    MAX_RUN,
    Denied,
    Door,
    Find,
    Found,
    Get,
    Listed,
    Sending,
    Weight,
    Words,
    chunks_of,
    encode,
    manifest_of,
)
from p2pinfer.node.weights.messages import decode_answer as decode_weights_answer
from p2pinfer.node.weights.messages import decode_request as decode_weights_request
from p2pinfer.reputation.account import Account
from p2pinfer.reputation.attestation import Attestation, Opinion, open_attestation, seal_attestation
from p2pinfer.reputation.exchange import export_ledger, import_ledger
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.proof import Proof, decode_proof, encode_proof, open_proof
from p2pinfer.reputation.receipt import (
    NO_RECEIPT,
    RECEIPT_VERSION,
    Receipt,
    ReceiptChain,
    Terms,
    decode_receipt,
    digest_of,
    sign_receipt,
)
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.routing.announcement import Announcement, decode_announcement, encode_announcement

HIDDEN_SIZE = 4
PEER_ID = "12D3KooWBhV9dp6qMsTBsEvKzJzHJ8cB4bqQzKyTbcbHkJBuV8Tq"
_REVISION = "0123456789abcdef" * 2
_SIGNATURE = bytes(64)
_STEPS = ((0, 2, 0), (2, 1, 0), (1, 1, 1))  # position, tokens, epoch


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder under attack.

    Attributes:
        seeds: What honest peers would send.
        run: Feeds it anything, and says whether that was taken for what belongs there; raises if it shows a
            fault.
    """

    name: str
    seeds: tuple[bytes, ...]
    run: Callable[[bytes], bool]


def targets() -> list[Target]:
    """All of them, in an order that does not change."""
    receipts = _receipts()
    contents = [each for number, (_, tokens, _) in enumerate(_STEPS) for each in _rows(number, tokens)]
    output_proof = Proof(1, PEER_ID, "output", tuple(receipts[:3]))
    equivocation = Proof(1, PEER_ID, "equivocation", (receipts[0], receipts[3]))
    pack = msgspec.msgpack.encode
    return [
        Target("receipt", tuple(receipts), _receipt),
        Target("chain", (pack(receipts[:3]), pack([receipts[0], receipts[3]])), _chain),
        Target("proof", (encode_proof(output_proof), encode_proof(equivocation)), _proof),
        Target("hop_record", (pack([encode_proof(output_proof), *contents]),), _hop_record),
        Target(
            "notice",
            (encode_notice(Notice("proof", _REVISION, bytes(32), PEER_ID, ("/ip4/1.2.3.4",))),),
            _notice,
        ),
        Target("attestation", (_attestation(),), _attest),
        Target("record", (pack([PEER_ID, _announcement(), _SIGNATURE]),), _record),
        Target("announcement", (_announcement(),), _announce),
        Target("snapshot", (encode_response([(_announcement(), 3.0)]), pack([_REVISION])), _snapshot),
        Target("evidence", (pack([[bytes(32), bytes([1]) * 32]]), pack([[32, None, 0]])), _evidence),
        Target(
            "weights",
            (
                encode(Get(bytes(32), 1, 2))[4:],
                encode(Find(_REVISION))[4:],
                encode(
                    Found(
                        "m",
                        "{}",
                        (Weight("a.safetensors", 3, bytes(32), True),),
                        (Words("config.json", 2, bytes(32)),),
                    )
                )[4:],
                encode(Listed(CHUNK_BYTES + 1, bytes(64)))[4:],
                encode(Sending(5))[4:],
                encode(Door(4001, bytes(32)))[4:],
                encode(Denied("later", 1.0))[4:],
            ),
            _weights,
        ),
        Target("signature", (PEER_ID.encode() + _SIGNATURE + b"said",), _signature),
        Target("export", (_export(),), _import),
        Target("account", (msgspec.json.encode(_account()),), _stored),
    ]


def _signed_by(peer_id: str, payload: bytes, signature: bytes) -> bool:
    return signature[-1:] == b"\0"


def _receipt(given: bytes) -> bool:
    try:
        receipt = decode_receipt(given)
    except ProtocolViolation:
        return False
    assert sign_receipt(receipt, lambda _: given[-64:]) == given, "two spellings of one receipt"
    assert 0 <= receipt.start < receipt.stop and receipt.returned <= receipt.tokens
    return True


def _chain(given: bytes) -> bool:
    signed = [each for each in _parts_of(given) if isinstance(each, bytes)]
    if not signed:
        return False
    try:
        first = decode_receipt(signed[0])
        chain = ReceiptChain(
            PEER_ID, Terms(first.session, first.revision, first.start, first.stop, first.codec), _signed_by
        )
        taken = [chain.extend(each) for each in signed]
    except ProtocolViolation:  # Equivocation is one
        return False
    assert [each.sequence for each in taken] == sorted({each.sequence for each in taken})
    assert [each.epoch for each in taken] == sorted(each.epoch for each in taken)
    return True


def _proof(given: bytes) -> bool:
    try:
        proof = decode_proof(given)
        accusation = open_proof(proof, _signed_by)
    except ProtocolViolation:
        return False
    assert decode_proof(encode_proof(proof)) == proof
    assert accusation.receipts and accusation.peer_id == proof.peer_id
    if accusation.kind == "equivocation":
        one, other = accusation.receipts
        assert (one.session, one.nonce, one.sequence) == (other.session, other.nonce, other.sequence)
        assert one != other
    else:
        assert [each.sequence for each in accusation.receipts] == list(range(len(accusation.receipts)))
    return True


def _hop_record(given: bytes) -> bool:
    proof, *contents = _parts_of(given) or [None]
    if not all(isinstance(each, bytes) for each in (proof, *contents)):
        return False
    try:
        accusation = open_proof(decode_proof(proof), _signed_by)
        # Who signs for nonsense can sign for its digests too.
        held = dict(zip(accusation.contents, contents, strict=False))
        record = HopRecord(accusation.peer_id, accusation.signed, accusation.receipts, held)
        history = history_of(record, HIDDEN_SIZE)
    except (ProtocolViolation, WrongOutput):
        return False
    assert history.inputs.isfinite().all() and history.outputs.isfinite().all()
    assert len(history.outputs) == len(history.positions) <= len(history.inputs)
    assert list(history.positions) == sorted(set(history.positions))
    return True


def _notice(given: bytes) -> bool:
    try:
        notice = decode_notice(given)
    except ProtocolViolation:
        return False
    assert decode_notice(encode_notice(notice)) == notice
    return True


def _attest(given: bytes) -> bool:
    try:
        attestation = open_attestation(given, _signed_by, 1000.0)
    except ProtocolViolation:
        return False
    ledger = Ledger()
    for peer_id in ("a", "b", "c"):
        ledger.record_audit(peer_id, Verdict.PASS, 1.0)
    before = {peer_id: ledger.score(peer_id).integrity for peer_id in ("a", "b", "c")}
    weight = ledger.attest(given, _signed_by, 1000.0)
    assert 0 <= weight <= 1
    assert all(0 <= opinion.mean <= 1 for opinion in attestation.opinions)
    for peer_id, integrity in before.items():
        assert 0 <= ledger.score(peer_id).integrity <= 1
        assert not ledger.is_banned(peer_id)
        assert weight or ledger.score(peer_id).integrity == integrity
        good, bad = ledger.attested(peer_id)
        assert good >= 0 and bad >= 0 and good + bad <= 1 + 1e-9, "hearsay above own evidence"
    return True


def _record(given: bytes) -> bool:
    try:
        open_record(given)
    except ProtocolViolation:
        return False
    raise AssertionError("a record whose signature was never made")


def _announce(given: bytes) -> bool:
    try:
        announcement = decode_announcement(given)
    except ProtocolViolation:
        return False
    assert decode_announcement(encode_announcement(announcement)) == announcement
    assert 0 < announcement.tokens_per_s < float("inf") and len(announcement.span) > 0
    return True


def _snapshot(given: bytes) -> bool:
    taken = False
    for decode in (decode_request, decode_response):
        with suppress(ProtocolViolation):
            decode(given)
            taken = True
    return taken


def _evidence(given: bytes) -> bool:
    taken = False
    for decode in (decode_ask, decode_answer):
        with suppress(ProtocolViolation):
            assert len(decode(given)) <= MAX_DIGESTS
            taken = True
    return taken


def _weights(given: bytes) -> bool:
    taken = False
    for decode in (decode_weights_request, decode_weights_answer):
        with suppress(ProtocolViolation):
            message = decode(given)
            taken = True
            if isinstance(message, Get):
                assert 1 <= message.count <= MAX_RUN and len(message.sha256) == 32
            if isinstance(message, Listed):
                with suppress(ProtocolViolation):
                    chunks = chunks_of(message)
                    assert sum(map(chunks.bytes_of, range(len(chunks)))) == chunks.size
            if isinstance(message, Found):
                revision = revision_digest(
                    weights_digest({each.name: each.sha256.hex() for each in message.weights}),
                    message.numbers,
                )
                with suppress(ProtocolViolation):
                    manifest = manifest_of(message, revision)
                    assert not any("/" in each.name or "\\" in each.name for each in manifest.weights)
                    assert manifest.revision == revision
    return taken


def _signature(given: bytes) -> bool:
    peer_id = given[:52].decode("utf-8", "replace")
    assert not verify(peer_id, given[116:], given[52:116]), "a signature that was never made"
    return False


def _import(given: bytes) -> bool:
    ledger = Ledger()
    try:
        count = import_ledger(ledger, given, 1000.0)
    except LocalError:
        assert not ledger.peers()
        return False
    assert count == len(ledger.peers())
    for peer_id in ledger.peers():
        score = ledger.score(peer_id)
        assert 0 <= score.integrity <= 1 and 0 <= score.reliability <= 1
        assert ledger.account(peer_id).last_seen <= 1000.0
        assert all(line.strip() for line in ledger.explain(peer_id))
    return True


def _stored(given: bytes) -> bool:
    try:
        account = msgspec.json.decode(given, type=Account)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    assert msgspec.json.decode(msgspec.json.encode(account), type=Account) == account
    return True


def _receipts() -> list[bytes]:
    """A chain of three, the last of a new epoch, and another one for the first's place."""
    signed: list[bytes] = []
    for number, (position, tokens, epoch) in enumerate(_STEPS):
        previous = digest_of(signed[-1]) if signed else NO_RECEIPT
        said = _said(number, previous, position, tokens, epoch)
        signed.append(sign_receipt(said, lambda _: _SIGNATURE))
    return [*signed, sign_receipt(_said(0, NO_RECEIPT, 0, 1, 0), lambda _: _SIGNATURE)]


def _said(sequence: int, previous: bytes, position: int, tokens: int, epoch: int) -> Receipt:
    given, returned = map(digest_of, _rows(sequence, tokens))
    return Receipt(
        version=RECEIPT_VERSION,
        session=bytes(16),
        sequence=sequence,
        previous=previous,
        revision=_REVISION,
        start=2,
        stop=5,
        position=position,
        tokens=tokens,
        returned=tokens,
        epoch=epoch,
        dtype="float32",
        codec="float32",
        input=given,
        output=returned,
        nonce=bytes([7]) * 16,
    )


def _rows(number: int, tokens: int) -> tuple[bytes, bytes]:
    """What comes in and what goes out in a step."""
    return bytes([number]) * 4 * HIDDEN_SIZE * tokens, bytes([10 + number]) * 4 * HIDDEN_SIZE * tokens


def _attestation() -> bytes:
    opinions = tuple(Opinion(peer_id, 0.66, 20.0) for peer_id in ("a", "b", "c", "d"))
    return seal_attestation(Attestation(1, PEER_ID, 900.0, opinions), lambda _: _SIGNATURE)


def _announcement() -> bytes:
    return encode_announcement(
        Announcement(
            PEER_ID,
            "tiny",
            _REVISION,
            BlockSpan(0, 4),
            "float32",
            20.0,
            4096,
            1,
            addrs=("/ip4/192.0.2.1/tcp/4001",),
        )
    )


def _account() -> Account:
    ledger = _ledger()
    return ledger.account("a")


def _ledger() -> Ledger:
    ledger = Ledger()
    for verdict in (Verdict.PASS, Verdict.SUSPECT, Verdict.INCONCLUSIVE):
        ledger.record_audit("a", verdict, 5.0, why="so it is")
    ledger.record_success("a", 6.0)
    ledger.ban("b", "rude", 7.0)
    return ledger


def _export() -> bytes:
    return export_ledger(_ledger())


def _parts_of(given: bytes) -> list[Any]:
    """What the array in `given` holds; nothing if it is none."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.msgpack.decode(given, type=list[Any])
    return []
