"""Verdict on a measured deviation: passed, failed, suspect or inconclusive.

The limits come from `benchmarks/calibrate_audit.py`; docs/audits.md has its table and what each limit
catches. Of a chunk, the typical token counts against altered weights, and so does what all tokens have in
common; the worst tenth counts against what is done to some tokens only, the worst token against tampering
with one, and the logits against what is small but well aimed.

Each limit is two: what lies between them is SUSPECT, and nobody is blamed for it, neither who computed nor
who accuses. Two processors do not measure quite the same, and between what one of them passes and what
another one fails there is room for that. All limits are written so that a number that is none exceeds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from p2pinfer.models.verify.deviation import ChunkDeviation, Deviation, Glance

_SHARED = "the common part of"
_LOST = "among"


class Verdict(Enum):
    """Outcome of an audit. Only FAIL, confirmed by somebody else, may cost a peer its standing."""

    PASS = "pass"
    FAIL = "fail"
    SUSPECT = "suspect"  # more than honest peers were seen to deviate, less than proves anything
    INCONCLUSIVE = "inconclusive"  # too little to look at, or it could not be looked at


@dataclass(frozen=True, slots=True)
class Limit:
    """Two bounds of a figure.

    Attributes:
        passes: Up to this value it is what honest peers come to.
        fails: Above this value no honest peer was seen, on any processor.
    """

    passes: float
    fails: float

    def judge(self, value: float) -> Verdict:
        """PASS, FAIL, or SUSPECT in between."""
        if value <= self.passes:
            return Verdict.PASS
        return Verdict.SUSPECT if value <= self.fails else Verdict.FAIL

    def widened(self, factor: float) -> Limit:
        """The limit of a ratio, whose usual value is 1, with so many times the room above that."""
        return Limit(1 + (self.passes - 1) * factor, 1 + (self.fails - 1) * factor)

    def raised(self, more: float) -> Limit:
        """The limit with both bounds higher by `more`."""
        return Limit(self.passes + more, self.fails + more)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of honest deviations. Ratios are in units of bfloat16's rounding."""

    chunk: Limit = Limit(1.17, 1.35)  # of a chunk's median token
    honest_chunk: float = 1.2  # the largest such value of any honest peer
    shared: Limit = Limit(0.35, 0.5)  # square of what a chunk's tokens deviate by in common
    upper: Limit = Limit(1.8, 2.4)  # of the worst tenth of a chunk's tokens
    token: Limit = Limit(4.5, 7.0)  # of any token
    first: Limit = Limit(5.0, 9.0)  # of the sequence's first token, whose activations are unlike all others
    logit_chunk: Limit = Limit(1.6, 2.2)  # of a chunk's median token, by its effect on the logits
    logit_token: Limit = Limit(7.0, 11.0)  # of any token, by its effect on the logits
    flip_margin: Limit = Limit(0.08, 0.12)  # lead, a difference of probabilities, that a token may lose
    full_chunk: int = 24  # tokens; the median of fewer strays further, and its limits with it
    least_tokens: int = 8  # fewer than these, together, cannot pass
    usual_alike: float = 0.12  # what tokens of ordinary text have in common of their rounding
    most_rerouted: float = 0.75  # share of a chunk's tokens that may take other experts; else it says nothing
    glance_chunk: float = 5.0  # of a chunk's median token at a glance, in units of what is carried
    glance_token: float = 14.0  # of any token at a glance, in the same units
    glance_lead: float = 0.02  # lead that a token may lose at a glance, as in small_lies.py


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict of one audit and what it rests on.

    Attributes:
        reason: One sentence for people.
        deviation: What was measured; None where nothing could be.
        logits_checked: Whether the effect on the logits was looked at. Without that, a small and well aimed
            change may have passed.
        contradicted: Whether three other peers agree on another output, and nothing else is known.
        spent_s: Processor time that it took, seconds.
    """

    verdict: Verdict
    reason: str
    deviation: Deviation | None = None
    logits_checked: bool = False
    contradicted: bool = False
    spent_s: float = 0.0


def judge(deviation: Deviation, thresholds: Thresholds | None = None) -> Finding:
    """The verdict on a measured deviation."""
    limits = thresholds or Thresholds()
    seen = bool(deviation.chunks) and all(chunk.logits for chunk in deviation.chunks)

    def finding(verdict: Verdict, reason: str) -> Finding:
        return Finding(verdict, reason, deviation, seen)

    figures = [
        (limit.judge(value), what, value, limit) for what, value, limit in judged_figures(deviation, limits)
    ]
    for worst in (Verdict.FAIL, Verdict.SUSPECT):
        for verdict, what, value, limit in figures:
            if verdict is worst:
                return finding(verdict, _exceeds(what, value, limit, verdict))
    telling = [chunk for chunk in deviation.chunks if _says_something(chunk, limits)]
    if len(telling) < len(deviation.chunks):
        return finding(
            Verdict.INCONCLUSIVE,
            "too many of its tokens may be either of two things: they lie between two experts, or are faint",
        )
    if (tokens := sum(independent_tokens(chunk, limits) for chunk in telling)) < limits.least_tokens:
        what = "" if tokens > 0.9 * deviation.tokens else f", so much alike that they count as {tokens:.1f},"
        return finding(
            Verdict.INCONCLUSIVE,
            f"{deviation.tokens} tokens{what} are too few to tell; {limits.least_tokens} would do",
        )
    most = max(chunk.median_rho for chunk in deviation.chunks)
    reason = f"{deviation.tokens} tokens deviate {most:.2f} times as much as rounding does, or less"
    return finding(Verdict.PASS, reason if seen else f"{reason}; their effect on the logits was not checked")


def judge_glance(glance: Glance, thresholds: Thresholds | None = None) -> Finding:
    """PASS where outputs lie about as near as rounding leaves them; else INCONCLUSIVE, never more."""
    limits = thresholds or Thresholds()
    reason = f"{glance.tokens} tokens lie {glance.typical:.2f} times as far off as carried values are rounded"
    is_near = glance.typical <= limits.glance_chunk and glance.worst <= limits.glance_token
    if not glance.lost <= limits.glance_lead:
        why = f"a token that led by {glance.lost:.2f} lost its lead"
        return Finding(Verdict.INCONCLUSIVE, f"{why}, which a glance does not settle")
    if not is_near or glance.tokens < limits.least_tokens:
        return Finding(Verdict.INCONCLUSIVE, f"{reason}, which a glance does not settle")
    return Finding(Verdict.PASS, f"{reason}, or less; they were not looked at more closely")


def judged_figures(deviation: Deviation, limits: Thresholds) -> Iterator[tuple[str, float, Limit]]:
    """Name, value and limit of each figure that is judged."""
    if deviation.first_rho is not None:
        yield "the first token", deviation.first_rho, limits.first
    for chunk in deviation.chunks:
        if _says_something(chunk, limits):
            for what, value, limit in _figures_of(chunk, limits):
                yield f"{what} tokens {chunk.start}-{chunk.stop - 1}", value, limit


def independent_tokens(chunk: ChunkDeviation, thresholds: Thresholds | None = None) -> float:
    """Number of tokens that round in their own way: in a text that repeats itself, few.

    As the effective size of a sample whose members correlate (Kish's design effect).
    """
    return independent(chunk.tokens, chunk.alike, thresholds or Thresholds())


def independent(tokens: int, alike: float, limits: Thresholds) -> float:
    """Number of tokens, of so many, that round in their own way if they have so much in common."""
    correlation = (alike - limits.usual_alike) / (1 - limits.usual_alike)
    return tokens / (1 + max(0, tokens - 1) * min(max(correlation, 0.0), 1.0))


def typical_excess(chunk: ChunkDeviation, thresholds: Thresholds | None = None) -> float:
    """Way of a chunk's typical token from the largest one of any honest peer to where it FAILs, 0..1."""
    limits = thresholds or Thresholds()
    room = Limit(limits.honest_chunk, limits.chunk.fails).widened(_scarcity(chunk, limits))
    return min(1.0, max(0.0, (chunk.median_rho - room.passes) / (room.fails - room.passes)))


def is_too_short(deviation: Deviation, thresholds: Thresholds | None = None) -> bool:
    """True if nothing but the number of tokens stands in the way of a verdict."""
    limits = thresholds or Thresholds()
    tokens = sum(independent_tokens(chunk, limits) for chunk in deviation.chunks)
    return 0 < tokens < limits.least_tokens and all(
        _says_something(each, limits) for each in deviation.chunks
    )


def _says_something(chunk: ChunkDeviation, limits: Thresholds) -> bool:
    """True if enough of its tokens took experts that leave no doubt."""
    whole = chunk.tokens + chunk.undecided
    return chunk.undecided + chunk.rerouted <= limits.most_rerouted * whole


def _figures_of(chunk: ChunkDeviation, limits: Thresholds) -> Iterator[tuple[str, float, Limit]]:
    scarcity = _scarcity(chunk, limits)
    yield "the typical one of", chunk.median_rho, limits.chunk.widened(scarcity)
    if chunk.logits:
        limit = limits.logit_chunk.widened(scarcity)
        yield "by its logits, the typical one of", chunk.logits.median_rho, limit
    if chunk.clouded:  # what an undecided token left in the caches may be why a few others deviate
        return
    yield "the worst one of", chunk.max_rho, limits.token
    if chunk.tokens >= limits.full_chunk:
        yield "a tenth of", chunk.upper_rho, limits.upper.widened(scarcity)
        alike = max(chunk.alike, chunk.swayed)
        shared = limits.shared.raised(2 * max(0.0, alike - limits.usual_alike))
        yield _SHARED, chunk.shared, shared
    if chunk.logits:
        yield "by its logits, the worst one of", chunk.logits.max_rho, limits.logit_token
        yield _LOST, chunk.logits.flip_margin, limits.flip_margin


def _scarcity(chunk: ChunkDeviation, limits: Thresholds) -> float:
    """Factor of the room for a median: few tokens share much of their rounding, a session's first above all.

    Of 15 such tokens honest peers reached 1.39, of 7 they reached 1.43, of 3 they reached 1.76.
    """
    return math.pow(max(1.0, limits.full_chunk / independent_tokens(chunk, limits)), 1.5)


def _exceeds(what: str, value: float, limit: Limit, verdict: Verdict) -> str:
    bound = limit.fails if verdict is Verdict.FAIL else limit.passes
    if what.startswith(_LOST):
        return f"{what} one that led by {value:.2f} lost its lead"
    if what.startswith(_SHARED):
        return f"{what} deviate by {max(value, 0.0) ** 0.5:.4g} in common, and {bound**0.5:.3g} is the limit"
    return f"{what} deviates {value:.4g} times as much as rounding does, and {bound:.3g} is the limit"
