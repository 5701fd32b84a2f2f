"""Judgement of a hop by other peers' outputs, where its blocks do not fit here.

Nobody here can say which of two different outputs is right. So the unit is neither's: it is the rounding of
the values that are carried (`noise_floor.carried_unit`), which follows from dtype and shape, times what the
depth of a span makes of it, which was calibrated. Outputs that agree to the bit are the usual case, of peers
with the same software on the same kind of processor, and need no exception.

Opinions are asked for one after the other, until one side is far enough ahead: two more for the audited peer
than against it pass it, three more against it than for it are SUSPECT, and five are asked at most. The right
output is one, so honest peers always agree, and whoever stands alone against so many is wrong or they all
collude. Those who answer take the same risk as the audited one: who vouches for an output that is outvoted is
outvoted with it. It raises the rate of audits, costs integrity if it repeats, and is no proof, since all of
them may be one person. Where a fifth of those who can be asked collude, they turn a vote against an honest
peer with a probability of 0.012, and pass a lie with one of 0.05; where two fifths do, 0.11 and 0.24.

Depth: honest outputs of 1 to 15 blocks, in bfloat16, float16 and float32, by own kernels and transformers',
lay at most 5.4 units apart by a chunk's median, with the unit growing as blocks^0.4. nf4 lay 29 or more, fp8
8.9, a skipped block 70, and int8 4 to 9, which cannot be told from rounding this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from p2pinfer.models.verify.packed_outputs import difference, packed_mask
from p2pinfer.models.verify.verify import check_rows, split_chunks
from p2pinfer.node.evidence.hop_record import History, HopRecord, history_of
from p2pinfer.reputation.verdict import Finding, Limit, Verdict

MOST_OPINIONS: Final = 5
LEAD: Final = 3  # by which others have to be ahead who contradict the audited peer
_GROWTH: Final = 0.4  # exponent by which the distance of honest outputs grows with the number of blocks
_APART: Final = Limit(8.0, 16.0)  # of a chunk's median, in units
_DISTINCT: Final = 4  # inputs among the tokens, of which fewer round too much alike for that limit
_ALIKE: Final = 0.1  # of its length, within which another input is the same
_LEAST_TOKENS: Final = 8  # that two peers must both have given an output for


class _Pair(Enum):
    """Relation of two outputs."""

    AGREE = "agree"
    APART = "apart"
    UNCLEAR = "unclear"  # between the two, or too little in common


@dataclass(frozen=True, slots=True)
class Vote:
    """The verdict of others on an output.

    Attributes:
        finding: PASS, SUSPECT or INCONCLUSIVE; FAIL only for outputs that are no numbers.
        outvoted: Indices of the opinions that three others of those asked contradict in one voice.
    """

    finding: Finding
    outvoted: tuple[int, ...] = ()


def compare_elsewhere(
    record: HopRecord, opinions: Sequence[HopRecord], hidden_size: int, lead: int = 2
) -> Vote:
    """The verdict where the blocks fit nowhere here, by other peers' outputs.

    INCONCLUSIVE may be settled by one opinion more, up to `MOST_OPINIONS`.

    Args:
        lead: By which those have to be ahead who agree with the audited peer.
    """
    if not all(are_comparable(record.numerics, each.numerics) for each in opinions):
        return Vote(Finding(Verdict.INCONCLUSIVE, "the receipts name numerics that cannot be compared"))
    try:
        audited = _outputs_of(record, hidden_size)
    except WrongOutput as exc:
        return Vote(Finding(Verdict.FAIL, f"the outputs cannot be: {exc}"))
    except ProtocolViolation as exc:
        return Vote(Finding(Verdict.INCONCLUSIVE, str(exc)))
    try:
        others = [_outputs_of(each, hidden_size) for each in opinions]
    except (WrongOutput, ProtocolViolation) as exc:
        return Vote(Finding(Verdict.INCONCLUSIVE, f"another peer's opinion is of no use: {exc}"))
    return judge_by_opinions(audited, others, len(record.span), lead)


def judge_by_opinions(audited: History, others: Sequence[History], blocks: int, lead: int = 2) -> Vote:
    """The verdict on outputs of so many blocks, by those of other peers for the same inputs."""
    outputs = [audited, *others]
    pairs = {
        (one, other): _relate(outputs[one], outputs[other], blocks)
        for one, other in combinations(range(len(outputs)), 2)
    }
    against = _largest_party(
        [index for index in range(1, len(outputs)) if pairs[0, index] is _Pair.APART], pairs
    )
    with_it = [index for index in range(1, len(outputs)) if pairs[0, index] is _Pair.AGREE]
    finding = _outcome(len(with_it), len(against), lead, any(each is _Pair.APART for each in pairs.values()))
    match finding.verdict:
        case Verdict.PASS:
            right = with_it
        case Verdict.SUSPECT:
            right = against
        case _:
            return Vote(finding)
    outvoted = [
        index
        for index in range(1, len(outputs))
        if sum(pairs[min(each, index), max(each, index)] is _Pair.APART for each in right if each != index)
        >= LEAD
    ]
    return Vote(finding, tuple(index - 1 for index in outvoted))


def _outcome(with_it: int, against: int, lead: int, contradict: bool) -> Finding:
    """The verdict where so many others agree with the audited peer, and so many against it."""
    if with_it - against >= lead:
        return Finding(Verdict.PASS, f"{with_it} other peers gave the same but for rounding")
    if against - with_it >= LEAD:
        reason = f"{against} other peers agree that its outputs are others; no proof"
        return Finding(Verdict.SUSPECT, reason, contradicted=True)
    if contradict:
        return Finding(Verdict.INCONCLUSIVE, "the other peers contradict each other")
    return Finding(Verdict.INCONCLUSIVE, "too few other peers agree on what its outputs should be")


def _largest_party(members: Sequence[int], pairs: Mapping[tuple[int, int], _Pair]) -> list[int]:
    """Most of the members who all agree with each other."""
    for size in range(len(members), 0, -1):
        for party in combinations(members, size):
            if all(pairs[pair] is _Pair.AGREE for pair in combinations(party, 2)):
                return [*party]
    return []


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
    packed = packed_mask(one.packed | other.packed, shared)
    ratio = max(_distance(inputs, *pair, packed) for pair in ((first, second), (second, first))) / unit
    # Equal tokens round alike. Of one word, repeated, float32 and bfloat16 gave outputs 28 units apart, of
    # two words 11, of four 8; with a block skipped these were 150 and more.
    if ratio <= _APART.passes:
        return _Pair.AGREE
    return _Pair.APART if ratio > _APART.fails * _DISTINCT / _count_distinct(inputs) else _Pair.UNCLEAR


def _count_distinct(inputs: Tensor) -> int:
    """Number of inputs that differ from each other, `_DISTINCT` at most."""
    count, left = 0, inputs
    while len(left) and count < _DISTINCT:
        left = left[(left - left[0]).norm(dim=-1) > _ALIKE * left[0].norm()]
        count += 1
    return count


def _rows(history: History, positions: Sequence[int]) -> Tensor:
    row = {position: index for index, position in enumerate(history.positions)}
    return history.outputs[[row[position] for position in positions]].float()


def _distance(inputs: Tensor, one: Tensor, other: Tensor, packed: Tensor | None) -> float:
    """Median distance of two outputs' tokens, (tokens, hidden_size), in the chunk where it is largest.

    In units of the rounding of `one`. Tokens are marked of which one of the two outputs was packed.
    """
    scale = channel_scale(inputs, one)
    unit = carried_unit(carried_square(one), scale).clamp_min(torch.finfo(torch.float32).tiny)
    ratios = (difference(other, one, packed) / scale).square().sum(-1).sqrt() / unit
    return max(float(ratios[part].median()) for part in split_chunks(0, len(ratios)))
