"""Verdict on a measured deviation: passed, failed, suspect or inconclusive.

The limits come from `benchmarks/calibrate_audit.py`; docs/audits.md has its table and what each limit
catches. Of a chunk, the typical token counts against altered weights, and so does what all tokens have in
common; the worst tenth counts against what is done to some tokens only, the worst token against tampering
with one, and the logits against what is small but well aimed. All limits are written so that a number that
is none exceeds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from p2pinfer.models.verify.deviation import ChunkDeviation, Deviation


class Verdict(Enum):
    """Outcome of an audit. Only FAIL, confirmed by somebody else, may cost a peer its standing."""

    PASS = "pass"
    FAIL = "fail"
    SUSPECT = "suspect"  # more than honest peers were seen to deviate, less than proves anything
    INCONCLUSIVE = "inconclusive"  # too little to look at, or it could not be looked at


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of honest deviations. Ratios are in units of bfloat16's rounding."""

    chunk: float = 1.25  # of a chunk's median token; above it fails
    suspect: float = 1.17  # the same; above it is suspect
    shared: float = 0.45  # square of what a chunk's tokens deviate by in common
    upper: float = 2.2  # of the worst tenth of a chunk's tokens
    token: float = 6.0  # of any token
    first: float = 8.0  # of the sequence's first token, whose activations are unlike all others
    logit_chunk: float = 2.0  # of a chunk's median token, by its effect on the logits
    logit_token: float = 10.0  # of any token, by its effect on the logits
    flip_margin: float = 0.1  # lead, as a difference of probabilities, that the likeliest token may lose
    full_chunk: int = 24  # tokens; the median of fewer strays further, and its limits with it
    least_tokens: int = 8  # fewer than these, together, cannot pass
    usual_alike: float = 0.12  # what tokens of ordinary text have in common of their rounding


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict of one audit and what it rests on.

    Attributes:
        reason: One sentence for people.
        deviation: What was measured; None where nothing could be.
        logits_checked: Whether the effect on the logits was looked at. Without that, a small and well aimed
            change may have passed.
    """

    verdict: Verdict
    reason: str
    deviation: Deviation | None = None
    logits_checked: bool = False


def judge(deviation: Deviation, thresholds: Thresholds | None = None) -> Finding:
    """The verdict on a measured deviation."""
    limits = thresholds or Thresholds()
    seen = bool(deviation.chunks) and all(chunk.logits for chunk in deviation.chunks)

    def finding(verdict: Verdict, reason: str) -> Finding:
        return Finding(verdict, reason, deviation, seen)

    for fault in _faults(deviation, limits):
        return finding(Verdict.FAIL, fault)
    for chunk in deviation.chunks:
        limit = _widened(limits.suspect, chunk, limits)
        if chunk.median_rho > limit:
            return finding(
                Verdict.SUSPECT, f"the typical one of {_name(chunk)} {_exceeds(chunk.median_rho, limit)}"
            )
    if (tokens := sum(_independent(chunk, limits) for chunk in deviation.chunks)) < limits.least_tokens:
        what = "" if tokens > 0.9 * deviation.tokens else f", so much alike that they count as {tokens:.1f},"
        return finding(
            Verdict.INCONCLUSIVE,
            f"{deviation.tokens} tokens{what} are too few to tell; {limits.least_tokens} would do",
        )
    worst = max(chunk.median_rho for chunk in deviation.chunks)
    reason = f"{deviation.tokens} tokens deviate {worst:.2f} times as much as rounding does, or less"
    return finding(Verdict.PASS, reason if seen else f"{reason}; their effect on the logits was not checked")


def _faults(deviation: Deviation, limits: Thresholds) -> Iterator[str]:
    """Every limit that is exceeded, as a sentence."""
    first = deviation.first_rho
    if first is not None and not first <= limits.first:
        yield f"the first token {_exceeds(first, limits.first)}"
    for chunk in deviation.chunks:
        for what, value, limit in _ratios(chunk, limits):
            if not value <= limit:
                yield f"{what} {_name(chunk)} {_exceeds(value, limit)}"
        if chunk.logits and not chunk.logits.flip_margin <= limits.flip_margin:
            yield f"among {_name(chunk)} one that led by {chunk.logits.flip_margin:.2f} lost its lead"


def _ratios(chunk: ChunkDeviation, limits: Thresholds) -> Iterator[tuple[str, float, float]]:
    """Name, value and limit of each ratio that is judged."""
    yield "the typical one of", chunk.median_rho, _widened(limits.chunk, chunk, limits)
    yield "the worst one of", chunk.max_rho, limits.token
    if chunk.tokens >= limits.full_chunk:
        yield "a tenth of", chunk.upper_rho, _widened(limits.upper, chunk, limits)
        shared = limits.shared + 2 * max(0.0, chunk.alike - limits.usual_alike)
        yield "the common part of", max(chunk.shared, 0.0) ** 0.5, shared**0.5
    if chunk.logits:
        limit = _widened(limits.logit_chunk, chunk, limits)
        yield "by its logits, the typical one of", chunk.logits.median_rho, limit
        yield "by its logits, the worst one of", chunk.logits.max_rho, limits.logit_token


def _widened(limit: float, chunk: ChunkDeviation, limits: Thresholds) -> float:
    """A median's limit for this chunk: few tokens share much of their rounding, above all a session's first.

    Of 15 such tokens honest peers reached 1.39, of 7 they reached 1.43, of 3 they reached 1.76.
    """
    return 1 + (limit - 1) * math.pow(max(1.0, limits.full_chunk / _independent(chunk, limits)), 1.5)


def _independent(chunk: ChunkDeviation, limits: Thresholds) -> float:
    """Number of tokens that round in their own way: in a text that repeats itself, few.

    As the effective size of a sample whose members correlate (Kish's design effect).
    """
    alike = (chunk.alike - limits.usual_alike) / (1 - limits.usual_alike)
    return chunk.tokens / (1 + (chunk.tokens - 1) * min(max(alike, 0.0), 1.0))


def _exceeds(value: float, limit: float) -> str:
    return f"deviates {value:.4g} times as much as rounding does, and {limit:.3g} is the limit"


def _name(chunk: ChunkDeviation) -> str:
    return f"tokens {chunk.start}-{chunk.stop - 1}"
