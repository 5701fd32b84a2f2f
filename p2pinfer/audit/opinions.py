"""Judgement of a hop by other peers' outputs, where its blocks do not fit here.

Nobody here can say which of two different outputs is right. So the unit is neither's: it is the rounding of
the values that are carried (`noise_floor.carried_unit`), which follows from dtype and shape, times what the
depth of a span makes of it, which was calibrated. Outputs that agree to the bit are the usual case, of peers
with the same software on the same kind of processor, and need no exception.

Two peers that agree with the audited one pass it. Where somebody is alone, a third is asked. Only what three
others contradict in one voice is SUSPECT: it raises the rate of audits, costs integrity if it repeats, and is
no proof, since three may be one person.

Depth: honest outputs of 1 to 15 blocks, in bfloat16, float16 and float32, by own kernels and transformers',
lay at most 5.4 units apart by a chunk's median, with the unit growing as blocks^0.4. nf4 lay 29 or more, fp8
8.9, a skipped block 70, and int8 4 to 9, which cannot be told from rounding this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import combinations
from typing import Final

import torch
from torch import Tensor

from p2pinfer.errors import ProtocolViolation, WrongOutput
from p2pinfer.models.numerics import are_comparable
from p2pinfer.models.verify.noise_floor import (
    carried_square,
    carried_unit,
    channel_scale,
    faint_tokens,
)
from p2pinfer.models.verify.verify import check_rows, split_chunks
from p2pinfer.node.evidence.hop_record import History, HopRecord, history_of
from p2pinfer.reputation.verdict import Finding, Limit, Verdict

_GROWTH: Final = 0.4  # exponent by which the distance of honest outputs grows with the number of blocks
_APART: Final = Limit(8.0, 16.0)  # of a chunk's median, in units
_LEAST_TOKENS: Final = 8  # that two peers must both have given an output for


class _Pair(Enum):
    """Relation of two outputs."""

    AGREE = "agree"
    APART = "apart"
    UNCLEAR = "unclear"  # between the two, or too little in common


def compare_elsewhere(
    record: HopRecord, one: HopRecord, other: HopRecord, hidden_size: int, third: HopRecord | None = None
) -> Finding:
    """The verdict where the blocks fit nowhere here, by two or three other peers' outputs.

    Returns:
        PASS, SUSPECT or INCONCLUSIVE; FAIL only for outputs that are no numbers, which everybody can see.
        INCONCLUSIVE of two may be settled by a third.
    """
    opinions = [each for each in (one, other, third) if each is not None]
    if not all(are_comparable(record.numerics, each.numerics) for each in opinions):
        return Finding(Verdict.INCONCLUSIVE, "the receipts name numerics that cannot be compared")
    try:
        audited = _outputs_of(record, hidden_size)
    except WrongOutput as exc:
        return Finding(Verdict.FAIL, f"the outputs cannot be: {exc}")
    except ProtocolViolation as exc:
        return Finding(Verdict.INCONCLUSIVE, str(exc))
    try:
        others = [_outputs_of(each, hidden_size) for each in opinions]
    except (WrongOutput, ProtocolViolation) as exc:
        return Finding(Verdict.INCONCLUSIVE, f"another peer's opinion is of no use: {exc}")
    return judge_by_opinions(audited, others, len(record.span))


def judge_by_opinions(audited: History, others: Sequence[History], blocks: int) -> Finding:
    """The verdict on outputs of so many blocks, by those of two or three other peers for the same inputs."""
    own = [_relate(audited, each, blocks) for each in others]
    theirs = [_relate(*pair, blocks) for pair in combinations(others, 2)]
    if own.count(_Pair.AGREE) >= 2:
        return Finding(Verdict.PASS, f"{own.count(_Pair.AGREE)} other peers gave the same but for rounding")
    if len(others) > 2 and set(own) == {_Pair.APART} and set(theirs) == {_Pair.AGREE}:
        reason = "three other peers agree that its outputs are others; no proof"
        return Finding(Verdict.SUSPECT, reason, contradicted=True)
    if _Pair.APART in theirs:
        return Finding(Verdict.INCONCLUSIVE, "the other peers contradict each other")
    return Finding(Verdict.INCONCLUSIVE, "too few other peers agree on what its outputs should be")


def _outputs_of(record: HopRecord, hidden_size: int) -> History:
    history = history_of(record, hidden_size)
    check_rows(history.outputs, len(history.positions), hidden_size, record.peer_id)
    return history


def _relate(one: History, other: History, blocks: int) -> _Pair:
    """Relation of two outputs of the same inputs; the first position, whose activations differ, is left out.

    Where they have too few tokens in common it is unclear.
    """
    shared = sorted(({*one.positions} & {*other.positions}) - {0} - faint_tokens(one.inputs))
    if len(shared) < _LEAST_TOKENS or len(one.inputs) <= shared[-1]:
        return _Pair.UNCLEAR
    first, second = (_rows(each, shared) for each in (one, other))
    inputs = one.inputs[shared].float()
    unit = blocks**_GROWTH
    ratio = max(_distance(inputs, first, second), _distance(inputs, second, first)) / unit
    match _APART.judge(ratio):
        case Verdict.PASS:
            return _Pair.AGREE
        case Verdict.FAIL:
            return _Pair.APART
        case _:
            return _Pair.UNCLEAR


def _rows(history: History, positions: Sequence[int]) -> Tensor:
    row = {position: index for index, position in enumerate(history.positions)}
    return history.outputs[[row[position] for position in positions]].float()


def _distance(inputs: Tensor, one: Tensor, other: Tensor) -> float:
    """Median distance of two outputs' tokens, (tokens, hidden_size), in the chunk where it is largest.

    In units of the rounding of `one`.
    """
    scale = channel_scale(inputs, one)
    unit = carried_unit(carried_square(one), scale).clamp_min(torch.finfo(torch.float32).tiny)
    ratios = ((other - one) / scale).square().sum(-1).sqrt() / unit
    return max(float(ratios[part].median()) for part in split_chunks(0, len(ratios)))
