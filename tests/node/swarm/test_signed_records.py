"""Sealed payloads: what opens, and that nothing else does."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ProtocolViolation
from p2pinfer.node.swarm.signed_records import MAX_RECORD_BYTES, open_record, seal
from p2pinfer.node.transport.identity import new_identity

ALICE = new_identity()


@given(st.binary(max_size=300))
def test_a_sealed_payload_opens_with_its_author(payload: bytes) -> None:
    assert open_record(seal(ALICE, payload)) == (ALICE.peer_id, payload)


@given(st.binary(max_size=300))
def test_garbage_does_not_open(record: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        open_record(record)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_record_with_one_byte_changed_does_not_open(position: int, change: int) -> None:
    record = bytearray(seal(ALICE, b"payload"))
    record[position % len(record)] ^= change
    with pytest.raises(ProtocolViolation):
        open_record(bytes(record))


def test_a_record_cannot_be_passed_off_as_somebody_elses() -> None:
    parts = msgspec.msgpack.decode(seal(ALICE, b"payload"))
    with pytest.raises(ProtocolViolation, match="not its author's"):
        open_record(msgspec.msgpack.encode([new_identity().peer_id, *parts[1:]]))


def test_a_signature_over_the_bare_payload_is_not_enough() -> None:
    """Else whatever else the key signs could be passed off as a record."""
    record = msgspec.msgpack.encode([ALICE.peer_id, b"payload", ALICE.sign(b"payload")])
    with pytest.raises(ProtocolViolation, match="not its author's"):
        open_record(record)


def test_size_is_limited() -> None:
    with pytest.raises(ProtocolViolation, match="allowed"):
        open_record(seal(ALICE, bytes(MAX_RECORD_BYTES)))
