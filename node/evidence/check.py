"""Check of a hop's evidence against its span's published weights: measured, then judged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from p2pinfer.errors import WrongOutput
from p2pinfer.models.numerics import Codec
from p2pinfer.models.span import BlockSpan
from p2pinfer.models.verify.reference import Reference, Tail
from p2pinfer.models.verify.train_passes import compare_pass, rerun_pass
from p2pinfer.models.verify.verify import measure_span
from p2pinfer.node.protocol.tensors import dtype_of
from p2pinfer.reputation.verdict import Finding, Thresholds, Verdict, judge

from .pass_record import PassHistory, PassRecord
from .pass_verdict import PassThresholds, judge_pass


def check_span(
    reference: Reference,
    span: BlockSpan,
    inputs: Tensor,
    outputs: Tensor,
    *,
    codec: Codec,
    positions: Sequence[int] | None = None,
    packed: frozenset[int] = frozenset(),
    tail: Tail | None = None,
    thresholds: Thresholds | None = None,
) -> Finding:
    """The verdict on one hop's outputs; computes for as long as two prefills of `span` take, and blocks.

    Args:
        reference: From `p2pinfer.models.verify.reference.open_reference`; any span that holds this one.
        span: What the hop ran.
        inputs: (tokens, hidden_size), all that it was given from position 0 on, decoded from the wire.
        outputs: (n, hidden_size), what it gave, decoded from the wire.
        codec: The session's.
        positions: Those of the outputs, ascending; None if the hop gave one for every input. The last hop
            gives only those that the client asked to be returned.
        packed: Those of outputs that were packed.
        tail: From `p2pinfer.models.verify.reference.open_tail` for the same span, to look at the logits as
            well. Behind the last span it is norm and head only; elsewhere it costs three prefills of the
            blocks that follow, and needs all outputs.
        thresholds: The calibrated ones if None.

    Returns:
        INCONCLUSIVE where the session cannot be run again: too long, or inputs that are not finite.
    """
    try:
        deviation = measure_span(
            reference,
            span,
            inputs,
            outputs,
            wire_dtype=dtype_of(codec),
            positions=positions,
            packed=packed,
            tail=tail,
            is_enough=lambda deviation: judge(deviation, thresholds).verdict is Verdict.FAIL,
        )
    except WrongOutput as exc:
        return Finding(Verdict.FAIL, f"the outputs cannot be: {exc}")
    except ValueError as exc:
        return Finding(Verdict.INCONCLUSIVE, f"the span could not be run again: {exc}")
    return judge(deviation, thresholds)


def check_pass(
    reference: Reference, record: PassRecord, history: PassHistory, thresholds: PassThresholds | None = None
) -> Finding:
    """The verdict on a pass of training; computes three such passes, and blocks.

    Returns:
        INCONCLUSIVE where the pass cannot be run again, or rounding decides what it gives.
    """
    try:
        floor = rerun_pass(reference, history.asked, dtype_of(record.receipt.codec))
        deviation = compare_pass(floor, history.hidden, history.vector, record.peer_id)
    except WrongOutput as exc:
        return Finding(Verdict.FAIL, f"the results cannot be: {exc}")
    except ValueError as exc:
        return Finding(Verdict.INCONCLUSIVE, f"the pass could not be run again: {exc}")
    return judge_pass(deviation, thresholds)
