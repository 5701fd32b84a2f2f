"""Judgement of a hop by the outputs of two other peers, where its blocks do not fit here."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.numerics import are_comparable
from p2pinfer.models.verify.noise_floor import measure_floor
from p2pinfer.models.verify.verify import check_rows, compare
from p2pinfer.node.evidence.hop_record import HopRecord, history_of
from p2pinfer.reputation.verdict import Finding, Thresholds, Verdict, judge

# How far two honest outputs lie apart at most, in roundings of the output to bfloat16, by a chunk's median.
# Spans of 1 to 15 blocks of both models in bfloat16 lay 1.8 to 11 from float32, which grows with the depth.
_APART: Final = 32.0
_COARSE: Final = Thresholds(chunk=8.0, suspect=4.0, shared=32.0, upper=16.0, token=64.0, first=500.0)


def compare_elsewhere(record: HopRecord, one: HopRecord, other: HopRecord, hidden_size: int) -> Finding:
    """The verdict where the blocks fit nowhere here: two peers' outputs stand for the two re-executions.

    Neither is float32, so the unit is the distance of two honest roundings, and where those agree to the bit,
    the rounding of what travels. That is coarser: what it finds to FAIL deviates by far more than honest
    peers do. Where the two are further apart than honest peers can be, one of them lies, and nothing is known
    of the third.
    """
    if not all(are_comparable(record.numerics, each.numerics) for each in (one, other)):
        return Finding(Verdict.INCONCLUSIVE, "the receipts name numerics that cannot be compared")
    try:
        history = history_of(record, hidden_size)
        first, second = history_of(one, hidden_size).outputs, history_of(other, hidden_size).outputs
        outputs = check_rows(history.outputs, len(history.positions), hidden_size, record.peer_id)
    except WrongOutput as exc:
        return Finding(Verdict.FAIL, f"the outputs cannot be: {exc}")
    except ProtocolViolation as exc:
        return Finding(Verdict.INCONCLUSIVE, str(exc))
    if not 0 < len(history.inputs) == len(first) == len(second):
        return Finding(Verdict.INCONCLUSIVE, "the other peers gave another number of outputs")
    if _contradict(history.inputs, first, second) or _contradict(history.inputs, second, first):
        return Finding(Verdict.INCONCLUSIVE, "the two other peers contradict each other")
    if torch.equal(first, second):
        second = first.bfloat16().float()
    floor = measure_floor(history.inputs, first, [second])
    return judge(compare(floor, outputs, history.positions), _COARSE)


def _contradict(inputs: Tensor, one: Tensor, other: Tensor) -> bool:
    """True if `other` is further from `one` than rounding explains; all (tokens, hidden_size) float32."""
    floor = measure_floor(inputs, one, [one.bfloat16().float()])
    return any(chunk.median_rho > _APART for chunk in compare(floor, other, range(len(one))).chunks)
