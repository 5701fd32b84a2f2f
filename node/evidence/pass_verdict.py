"""Verdict on a pass of training: passed, failed, suspect or inconclusive, as in `reputation/verdict.py`.

Outputs are judged by the limits of sessions, and so are gradients of hidden states, with more room for the
typical token: fewer peers were measured. The gradient of an adapter is judged by each of its tensors and by
the typical one. The limits come from `benchmarks/honest_training.py`; docs/audits.md has what each catches.

Whoever trains chooses inputs and adapter. So nothing is judged where rounding decides the result, or where
too few tokens round in their own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Final

from p2pinfer.models.verify.deviation import PassDeviation
from p2pinfer.reputation.verdict import Finding, Limit, Thresholds, Verdict, independent, judge

_ORDER: Final = (Verdict.FAIL, Verdict.SUSPECT)


_OUTPUTS: Final = Thresholds()
_GRADIENTS: Final = Thresholds(chunk=Limit(1.25, 1.5))
_TENSOR: Final = Limit(2.0, 3.0)
_TYPICAL_TENSOR: Final = Limit(1.3, 1.6)


@dataclass(frozen=True, slots=True)
class PassThresholds:
    """Limits of honest passes. Ratios are in units of bfloat16's rounding."""

    outputs: Thresholds = _OUTPUTS
    gradients: Thresholds = _GRADIENTS
    tensor: Limit = _TENSOR  # of any tensor of the adapter
    typical_tensor: Limit = _TYPICAL_TENSOR  # of the median tensor
    full_tokens: int = 24  # tokens that round in their own way; the limits of tensors widen for fewer
    least_tokens: int = 8  # fewer say nothing
    most_rough: float = 0.3  # part of a result that rounding may decide; else it says nothing


def judge_pass(deviation: PassDeviation, thresholds: PassThresholds | None = None) -> Finding:
    """The verdict on a measured pass."""
    limits = thresholds or PassThresholds()
    tokens = independent(deviation.tokens, deviation.alike, limits.outputs)
    if tokens < limits.least_tokens:
        return Finding(
            Verdict.INCONCLUSIVE,
            f"{deviation.tokens} tokens, which count as {tokens:.1f}, are too few to tell; "
            f"{limits.least_tokens} would do",
        )
    if not deviation.roughness <= limits.most_rough:
        return Finding(
            Verdict.INCONCLUSIVE, f"rounding decides {deviation.roughness:.0%} of what this pass gives"
        )
    findings = [Finding(verdict, why) for verdict, why in _of_tensors(deviation, tokens, limits)]
    if deviation.hidden is not None and deviation.hidden.chunks:
        used = limits.gradients if deviation.is_backward else limits.outputs
        found = judge(deviation.hidden, used)
        what = "gradient of the inputs" if deviation.is_backward else "outputs"
        findings.append(Finding(found.verdict, f"{what}: {found.reason}"))
    for worst in (*_ORDER, Verdict.PASS):
        for finding in findings:
            if finding.verdict is worst:
                return finding
    return (
        findings[0] if findings else Finding(Verdict.INCONCLUSIVE, "nothing came back that could be judged")
    )


def _of_tensors(
    deviation: PassDeviation, tokens: float, limits: PassThresholds
) -> Iterator[tuple[Verdict, str]]:
    """Verdicts on the tensors of an adapter's gradient, and on their median."""
    if not deviation.tensors:
        return
    scarcity = max(1.0, limits.full_tokens / tokens) ** 1.5
    worst = max(deviation.tensors, key=lambda each: each.rho)
    typical = median(each.rho for each in deviation.tensors)
    figures = [(f"the gradient of {worst.name}", worst.rho, limits.tensor)]
    if len(deviation.tensors) >= 3:
        figures.append(("the typical gradient of the adapter", typical, limits.typical_tensor))
    for what, value, limit in figures:
        room = limit.widened(scarcity)
        verdict = room.judge(value)
        if deviation.doubtful and verdict is Verdict.FAIL:
            verdict = Verdict.SUSPECT  # tokens between two experts are part of every sum
        reason = f"{what} deviates {value:.4g} times as much as rounding does"
        yield verdict, reason if verdict is Verdict.PASS else f"{reason}, and {room.fails:.3g} is the limit"
