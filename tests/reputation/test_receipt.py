"""What makes a receipt, a chain of them, and a lie."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import Equivocation, ProtocolViolation
from p2pinfer.reputation.proof import Proof, open_proof
from p2pinfer.reputation.receipt import (
    MAX_RECEIPT_BYTES,
    NO_RECEIPT,
    RECEIPT_VERSION,
    Receipt,
    ReceiptChain,
    Terms,
    broken_link,
    contradict,
    decode_receipt,
    digest_of,
    open_receipt,
    sign_receipt,
)

from ..node.memory import sign, verify

SESSION, NONCE = b"s" * 16, b"n" * 16
TERMS = Terms(SESSION, "r" * 32, 2, 5, "bfloat16")

DIGESTS = st.binary(min_size=32, max_size=32)
COUNTS = st.integers(0, 2**32 - 1)


@st.composite
def receipts(draw: st.DrawFn) -> Receipt:
    start, tokens = draw(st.integers(0, 2**16 - 1)), draw(COUNTS)
    return Receipt(
        RECEIPT_VERSION,
        draw(st.binary(min_size=16, max_size=16)),
        draw(COUNTS),
        draw(DIGESTS),
        draw(st.text(max_size=64).filter(lambda text: len(text.encode()) < 256)),
        start,
        draw(st.integers(start + 1, 2**16)),
        draw(COUNTS),
        tokens,
        draw(st.integers(0, tokens)),
        draw(COUNTS),
        draw(st.from_regex(r"[a-z0-9_]{1,16}", fullmatch=True)),
        draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        draw(DIGESTS),
        draw(DIGESTS),
        draw(st.binary(min_size=16, max_size=16)),
    )


def receipt(sequence: int = 0, previous: bytes = NO_RECEIPT, **fields: Any) -> Receipt:
    said: dict[str, Any] = {
        "revision": "r" * 32,
        "start": 2,
        "stop": 5,
        "codec": "bfloat16",
        "position": sequence,
        "tokens": 1,
        "returned": 1,
        "epoch": 0,
        "dtype": "bfloat16",
        "input": digest_of(b"in %d" % sequence),
        "output": digest_of(b"out %d" % sequence),
        "nonce": NONCE,
    }
    return Receipt(
        version=RECEIPT_VERSION,
        session=SESSION,
        sequence=sequence,
        previous=previous,
        **{**said, **fields},
    )


def signed(each: Receipt, signer: str = "hop") -> bytes:
    return sign_receipt(each, partial(sign, signer))


def chain() -> ReceiptChain:
    return ReceiptChain("hop", TERMS, verify)


@given(receipts())
def test_what_is_signed_is_read_back_and_fits_the_wire(each: Receipt) -> None:
    travelling = signed(each)
    assert len(travelling) <= MAX_RECEIPT_BYTES
    assert open_receipt(travelling, "hop", verify) == each


@given(st.binary(max_size=MAX_RECEIPT_BYTES + 10))
def test_garbage_is_a_violation(garbage: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_receipt(garbage)


@given(receipts(), st.data())
def test_no_byte_of_a_receipt_can_be_changed(each: Receipt, data: st.DataObject) -> None:
    travelling = bytearray(signed(each))
    at = data.draw(st.integers(0, len(travelling) - 1))
    travelling[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolViolation) as caught:
        open_receipt(travelling, "hop", verify)
    assert caught.value.peer_id == "hop"


def test_other_spellings_of_a_receipt_are_none() -> None:
    """What one signature covers must have one meaning and one digest."""
    fields = msgspec.msgpack.decode(signed(receipt())[:-64])
    for spelling in ([*fields, "more"], [*fields[:-1], list(fields[-1])]):
        with pytest.raises(ProtocolViolation):
            decode_receipt(msgspec.msgpack.encode(spelling) + bytes(64))


@pytest.mark.parametrize("fields", [{"start": 5, "stop": 5}, {"tokens": 1, "returned": 2}])
def test_a_receipt_over_nothing_is_none(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation, match="over nothing"):
        decode_receipt(signed(receipt(**fields)))


def test_nobody_signs_for_somebody_else() -> None:
    with pytest.raises(ProtocolViolation, match="signature"):
        open_receipt(signed(receipt(), "another"), "hop", verify)


def test_a_chain_takes_what_follows() -> None:
    following = chain()
    previous = NO_RECEIPT
    for sequence in range(3):
        each = signed(receipt(sequence, previous))
        assert following.extend(each).sequence == sequence
        previous = digest_of(each)


@pytest.mark.parametrize(
    "fields",
    [
        {"revision": "q" * 32},
        {"start": 1},
        {"stop": 6},
        {"codec": "float32"},
    ],
)
def test_a_receipt_for_other_terms_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation, match="another session, model or span"):
        chain().extend(signed(receipt(**fields)))


def test_a_chain_does_not_begin_in_the_middle() -> None:
    with pytest.raises(ProtocolViolation, match="begins in the middle"):
        chain().extend(signed(receipt(0, digest_of(b"history"))))


@pytest.mark.parametrize(
    ("sequence", "fields", "complaint"),
    [
        (1, {}, "does not follow"),
        (3, {}, "came after"),
        (1, {"nonce": b"m" * 16}, "two chains"),
        (1, {"dtype": "float32"}, "two chains"),
    ],
)
def test_what_does_not_follow_is_refused(sequence: int, fields: dict[str, Any], complaint: str) -> None:
    following = chain()
    following.extend(signed(receipt()))
    with pytest.raises(ProtocolViolation, match=complaint):
        following.extend(signed(receipt(sequence, digest_of(b"another"), **fields)))


def test_an_epoch_never_falls() -> None:
    following = chain()
    first = signed(receipt(epoch=2))
    following.extend(first)
    with pytest.raises(ProtocolViolation, match="two chains"):
        following.extend(signed(receipt(1, digest_of(first), epoch=1)))


def test_receipts_that_a_new_epoch_superseded_may_be_missing() -> None:
    following = chain()
    following.extend(signed(receipt()))
    assert following.extend(signed(receipt(4, digest_of(b"unseen"), epoch=1))).sequence == 4


def test_a_receipt_that_comes_twice_is_refused_and_no_fraud() -> None:
    following = chain()
    following.extend(signed(receipt()))
    with pytest.raises(ProtocolViolation, match="came after") as caught:
        following.extend(signed(receipt()))
    assert not isinstance(caught.value, Equivocation)


def test_two_receipts_for_one_step_are_kept_as_the_proof() -> None:
    following = chain()
    one, other = signed(receipt()), signed(receipt(output=digest_of(b"something else")))
    following.extend(one)
    with pytest.raises(Equivocation) as caught:
        following.extend(other)
    assert (caught.value.peer_id, caught.value.receipts) == ("hop", (one, other))


@pytest.mark.parametrize(
    "fields",
    [{"epoch": 1}, {"position": 7}, {"returned": 0}, {"dtype": "float32"}, {"received": b"x" * 32}],
    ids=lambda fields: next(iter(fields)),
)
def test_two_receipts_for_one_place_are_a_proof_whatever_they_differ_in(fields: dict[str, Any]) -> None:
    """In another epoch as well: what a hop tells a neighbour it has told the client."""
    following, one, other = chain(), signed(receipt()), signed(receipt(**fields))
    following.extend(one)
    with pytest.raises(Equivocation):
        following.extend(other)
    assert open_proof(Proof(1, "hop", "equivocation", (one, other)), verify).peer_id == "hop"
    with pytest.raises(ProtocolViolation):
        open_proof(Proof(1, "hop", "equivocation", (one, one)), verify)
    with pytest.raises(ProtocolViolation):
        open_proof(Proof(1, "hop", "equivocation", (one, signed(receipt(**fields), "other"))), verify)


def test_a_session_that_was_opened_twice_is_no_contradiction() -> None:
    """A client that reuses a session's name frames nobody: the hop's nonce is another."""
    assert not contradict(receipt(), receipt(nonce=b"m" * 16, output=digest_of(b"other")))
    assert contradict(receipt(), receipt(output=digest_of(b"other")))
    assert not contradict(receipt(), receipt())


def test_links_are_held_against_both_ends() -> None:
    a, b, c, d = (digest_of(name) for name in (b"a", b"b", b"c", b"d"))
    route = [receipt(input=a, output=b), receipt(input=b, output=c)]
    assert broken_link(route, a, c) is None
    assert broken_link(route, d, c) == 0
    assert broken_link(route, a, d) == 1
    assert broken_link([route[0], receipt(input=d, output=c)], a, c) == 1
