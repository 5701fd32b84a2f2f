"""Glance at a session's outputs: one run of the span, and a unit that needs no other.

What the published blocks give in float32 is run once. The unit is the rounding of the values that are carried
from block to block (`noise_floor.carried_unit`), which follows from that run. Honest outputs lie a little
further away than that, since an operation rounds more than once a block; a span that was not computed as
published lies ten times as far. So a glance tells a gross lie from the truth at a third of the price of
`verify.measure_span`. It cannot tell small ones, and it never speaks against anybody: where it sees
something, the session is measured.

A change well within that distance may give another token the lead, if it is aimed. So where head and norm are
at hand, and nothing is left to run, a few tokens that nobody can foresee are followed up to their logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.compute.embedding_and_head import EmbeddingAndHead
from p2pinfer.models.compute.runner import SpanRunner
from p2pinfer.models.span import BlockSpan

from .deviation import Glance
from .logits import lost_lead
from .noise_floor import carried_unit, channel_scale
from .packed_outputs import packed_mask, unpacked_towards
from .sessions import run_session
from .verify import check_positions, check_rows, split_chunks


def glance_at(
    exact: SpanRunner,
    span: BlockSpan,
    inputs: Tensor,
    outputs: Tensor,
    positions: Sequence[int] | None = None,
    *,
    packed: frozenset[int] = frozenset(),
    ends: EmbeddingAndHead | None = None,
    followed: Sequence[int] = (),
) -> Glance:
    """Distance of a session's outputs from what `span` gives; see `verify.measure_span` for the tensors.

    Args:
        exact: Runs the span in float32; it may hold more blocks.
        ends: Norm and head behind the span, if that is the model's last one and they are at hand.
        followed: Indices of the outputs of which the logits are looked at.

    Raises:
        ValueError: The inputs cannot be run, or the positions are not theirs.
        WrongOutput: The outputs are misshapen, not finite or absurdly large.
    """
    at = check_positions(positions, len(inputs))
    outputs = check_rows(outputs, len(at), exact.spec.hidden_size)
    try:
        inputs = check_rows(inputs, len(inputs), exact.spec.hidden_size)
    except WrongOutput as exc:
        raise ValueError(f"the inputs cannot be: {exc}") from exc
    where, packing = torch.tensor(at, dtype=torch.long), packed_mask(packed, at)
    with torch.inference_mode():
        carried = torch.zeros_like(inputs)
        right = run_session(exact, inputs, span, carried)
        outputs = unpacked_towards(right[where], outputs, packing)
        scale = channel_scale(inputs, right)
        unit = carried_unit(carried, scale).clamp_min(torch.finfo(torch.float32).tiny)
        lost = 0.0
        if ends is not None and len(followed):
            lost = lost_lead(ends, right[where][list(followed)], outputs[list(followed)])
        distances = ((outputs - right[where]) / scale).norm(dim=-1) / unit[where]
    parts = [distances[part] for part in split_chunks(1 if at[:1] == [0] else 0, len(at))]
    return Glance(
        sum(map(len, parts)),
        max((float(part.median()) for part in parts), default=0.0),
        max((float(part.max()) for part in parts), default=0.0),
        lost,
    )
