"""What a hop signs, and what it does not."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import msgspec
import pytest

from p2pinfer.errors import ProtocolViolation
from p2pinfer.models.numerics import FLOAT32
from p2pinfer.node.protocol.messages import Open, Step
from p2pinfer.node.serve.receipt_signer import INLINE_BYTES, ReceiptSigner
from p2pinfer.reputation.receipt import (
    NO_RECEIPT,
    RECEIPT_VERSION,
    Receipt,
    digest_of,
    open_receipt,
    sign_receipt,
)

from ..memory import sign, verify

OPENING = Open(b"s" * 16, "r" * 32, 2, 5, 64, "bfloat16", predecessor="before")
FIRST = msgspec.structs.replace(OPENING, predecessor=None)


def notary(signer: str = "hop", opening: Open = OPENING) -> ReceiptSigner:
    return ReceiptSigner(opening, FLOAT32, partial(sign, signer))


async def test_receipts_say_what_was_done_and_follow_each_other() -> None:
    writer = notary(opening=FIRST)
    first = await writer.attest(Step(0, 0, 0, 3, 0), b"in", b"out", 3)
    second = await writer.attest(Step(7, 2, 3, 1, 1), bytearray(b"more"), memoryview(b"less"), 1)
    one, two = (open_receipt(each.receipt, "hop", verify) for each in (first, second))
    assert (one.session, one.revision, one.start, one.stop) == (b"s" * 16, "r" * 32, 2, 5)
    assert (one.position, one.tokens, one.returned, one.epoch) == (0, 3, 3, 0)
    assert (one.dtype, one.codec, one.previous) == ("float32", "bfloat16", NO_RECEIPT)
    assert (one.input, one.output) == (digest_of(b"in"), digest_of(b"out"))
    assert (first.input_digest, first.output_digest) == (one.input, one.output)
    assert first.receipt_digest == digest_of(first.receipt) == two.previous
    assert (two.sequence, two.position, two.epoch, two.nonce) == (1, 3, 2, one.nonce)


async def test_every_session_has_a_nonce_of_its_own() -> None:
    step = Step(0, 0, 0, 1, 1)
    nonces = {
        open_receipt((await notary(opening=FIRST).attest(step, b"", b"", 1)).receipt, "hop", verify).nonce
        for _ in range(3)
    }
    assert len(nonces) == 3


async def test_large_payloads_are_hashed_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[int, int] = {}

    def noting(payload: bytes) -> bytes:
        threads[len(payload)] = threading.get_ident()
        return digest_of(payload)

    monkeypatch.setattr("p2pinfer.node.serve.receipt_signer.digest_of", noting)
    writer, here = notary(opening=FIRST), threading.get_ident()
    await writer.attest(Step(0, 0, 0, 1, 1), bytes(100), bytes(INLINE_BYTES - 100), 1)
    await writer.attest(Step(1, 0, 1, 1, 1), bytes(101), bytes(INLINE_BYTES), 1)
    assert threads[100] == threads[INLINE_BYTES - 100] == here
    assert threads[101] == threads[INLINE_BYTES] != here


async def test_nothing_is_signed_for_what_the_predecessor_did_not_sign_for() -> None:
    first, before = signed_by_both()
    step = Step(0, 0, 0, 1, 1)
    ours = await notary().attest(with_receipts(step, first, before), b"hidden", b"out", 1)
    assert ours.input_digest == digest_of(b"hidden")
    assert open_receipt(ours.receipt, "hop", verify).received == digest_of(before)
    other_place = signed("before", 1, 2, position=1)
    for receipts, payload in (
        ((first, before), b"hiddem"),
        ((first, b"nonsense"), b"hidden"),
        ((b"nonsense", before), b"hidden"),
        ((first[:-1] + b"?", before), b"hidden"),  # which `before` was not given
        ((before,), b"hidden"),  # it names one before it
        ((), b"hidden"),
        ((first, other_place), b"hidden"),
        ((first, signed("before", 1, 2, received=digest_of(first), session=b"t" * 16)), b"hidden"),
        ((first, signed("before", 0, 1, received=digest_of(first))), b"hidden"),
    ):
        with pytest.raises(ProtocolViolation) as caught:
            await notary().attest(with_receipts(step, *receipts), payload, b"out", 1)
        assert caught.value.peer_id == "before"


async def test_what_the_client_feeds_comes_with_any_receipts() -> None:
    step = with_receipts(Step(0, 0, 0, 1, 1), b"whatever")
    await notary(opening=FIRST).attest(step, b"whatever the client sends", b"out", 1)


async def test_a_replay_comes_without_receipts() -> None:
    replayed = await notary().attest(Step(0, 1, 0, 1, 0, replay=1), b"hidden", b"out", 1)
    assert open_receipt(replayed.receipt, "hop", verify).received == NO_RECEIPT


def signed_by_both() -> tuple[bytes, bytes]:
    """Receipts of the two hops before ours, which fit."""
    first = signed("first", 0, 1)
    return first, signed("before", 1, 2, received=digest_of(first))


def signed(peer_id: str, start: int, stop: int, **fields: Any) -> bytes:
    digests = digest_of(b"in"), digest_of(b"hidden")
    receipt = Receipt(
        RECEIPT_VERSION, b"s" * 16, 0, NO_RECEIPT, "r" * 32, start, stop, 0, 1, 1, 0, "float32", "bfloat16",
        *digests, b"n" * 16,
    )  # fmt: skip
    return sign_receipt(msgspec.structs.replace(receipt, **fields), partial(sign, peer_id))


def with_receipts(step: Step, *receipts: bytes) -> Step:
    return msgspec.structs.replace(step, receipts=receipts)
