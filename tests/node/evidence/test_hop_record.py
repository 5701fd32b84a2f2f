"""What stands at a session's end, of all that its receipts name."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import torch
from torch import Tensor

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.node.evidence.hop_record import History, HopRecord, history_of
from p2pinfer.node.protocol.tensors import encode_hidden
from p2pinfer.reputation.receipt import NO_RECEIPT, RECEIPT_VERSION, Payload, Receipt, digest_of

HIDDEN = 4


def rows(value: float, count: int) -> Tensor:
    return torch.full((count, HIDDEN), value)


def record_of(steps: Sequence[tuple[int, Tensor, Tensor]]) -> HopRecord:
    """Of (position, input, output)."""
    contents: dict[bytes, Payload] = {}
    receipts: list[Receipt] = []
    for number, (position, given, got) in enumerate(steps):
        payloads = [encode_hidden(each, "float32") for each in (given, got)]
        digests = [digest_of(each) for each in payloads]
        contents |= dict(zip(digests, payloads, strict=True))
        sizes = (position, len(given), len(got))
        said = (*sizes, 0, "float32", "float32", *digests, b"n" * 16)
        receipts.append(
            msgspec.convert((RECEIPT_VERSION, b"s" * 16, number, NO_RECEIPT, "r", 0, 1, *said), Receipt)
        )
    return HopRecord("hop", (), tuple(receipts), contents)


def shape_of(history: History) -> tuple[list[float], list[float], tuple[int, ...]]:
    inputs, outputs = ([float(row[0]) for row in rows] for rows in (history.inputs, history.outputs))
    return inputs, outputs, history.positions


def test_steps_follow_each_other() -> None:
    record = record_of([(0, rows(1, 2), rows(10, 2)), (2, rows(2, 1), rows(20, 1))])
    assert shape_of(history_of(record, HIDDEN)) == ([1, 1, 2], [10, 10, 20], (0, 1, 2))


def test_the_last_hop_gives_the_last_rows_of_each_step() -> None:
    record = record_of([(0, rows(1, 3), rows(10, 1)), (3, rows(2, 1), rows(20, 1))])
    assert shape_of(history_of(record, HIDDEN)) == ([1, 1, 1, 2], [10, 20], (2, 3))


def test_what_was_rolled_back_does_not_count() -> None:
    steps = [(0, rows(1, 4), rows(10, 4)), (4, rows(2, 2), rows(20, 2)), (3, rows(3, 2), rows(30, 2))]
    assert shape_of(history_of(record_of(steps), HIDDEN)) == (
        [1, 1, 1, 3, 3],
        [10, 10, 10, 30, 30],
        (0, 1, 2, 3, 4),
    )
    last = [(0, rows(1, 4), rows(10, 1)), (2, rows(2, 1), rows(20, 1))]
    assert shape_of(history_of(record_of(last), HIDDEN)) == ([1, 1, 2], [20], (2,))


def test_of_many_positions_the_first_are_taken() -> None:
    """A receipt weighs a few hundred bytes, and may name the same megabytes as the one before."""
    steps = [(number * 2, rows(1, 2), rows(10, 2)) for number in range(100)]
    history = history_of(record_of(steps), HIDDEN, max_tokens=5)
    assert shape_of(history) == ([1] * 5, [10] * 5, (0, 1, 2, 3, 4))
    assert shape_of(history_of(record_of([*steps, (1, rows(2, 1), rows(20, 1))]), HIDDEN)) == (
        [1, 2],
        [10, 20],
        (0, 1),
    )


def test_a_position_of_which_nothing_is_known_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="nothing is known of position 1"):
        history_of(record_of([(0, rows(1, 1), rows(1, 1)), (2, rows(1, 1), rows(1, 1))]), HIDDEN)


def test_payloads_of_another_size_or_missing_are_a_violation() -> None:
    whole = record_of([(0, rows(1, 2), rows(1, 2))])
    with pytest.raises(ProtocolViolation, match="rows are due"):
        history_of(whole, HIDDEN + 1)
    with pytest.raises(ProtocolViolation, match="0 bytes where 2 rows are due"):
        history_of(HopRecord("hop", (), whole.receipts, {}), HIDDEN)


def test_who_signs_for_what_is_not_finite_is_wrong_and_who_was_sent_it_is_not() -> None:
    with pytest.raises(WrongOutput) as caught:
        history_of(record_of([(0, rows(1, 1), rows(torch.nan, 1))]), HIDDEN)
    assert caught.value.peer_id == "hop"
    with pytest.raises(ProtocolViolation, match="an input that cannot be"):
        history_of(record_of([(0, rows(torch.inf, 1), rows(1, 1))]), HIDDEN)
