from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.models.verify.deviation import ChunkDeviation, Deviation, LogitDeviation
from p2pinfer.reputation.verdict import Thresholds, Verdict, judge

LIMITS = Thresholds()
FAIR = LogitDeviation(1.0, 1.5, 0.0)


def chunk(
    median: float = 1.0,
    upper: float = 1.2,
    worst: float = 1.5,
    tokens: int = 32,
    logits: LogitDeviation | None = FAIR,
    shared: float = 0.1,
    alike: float = 0.1,
) -> ChunkDeviation:
    return ChunkDeviation(1, 1 + tokens, tokens, median, upper, worst, shared, logits, alike)


def verdict_on(*chunks: ChunkDeviation, first: float | None = None) -> Verdict:
    return judge(Deviation(chunks, first)).verdict


def test_what_rounds_as_bfloat16_does_passes_and_the_reason_says_how_far_it_was_off() -> None:
    finding = judge(Deviation((chunk(), chunk(1.1)), 3.0))
    assert finding.verdict is Verdict.PASS
    assert finding.logits_checked
    assert finding.reason == "64 tokens deviate 1.10 times as much as rounding does, or less"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (chunk(LIMITS.chunk + 0.01), "the typical one of tokens 1-32"),
        (chunk(worst=LIMITS.token + 0.01), "the worst one of tokens 1-32"),
        (chunk(upper=LIMITS.upper + 0.01), "a tenth of tokens 1-32"),
        (chunk(shared=LIMITS.shared + 0.01), "the common part of tokens 1-32"),
        (chunk(logits=LogitDeviation(LIMITS.logit_chunk + 0.01, 2, 0)), "by its logits, the typical one"),
        (chunk(logits=LogitDeviation(1, LIMITS.logit_token + 0.01, 0)), "by its logits, the worst one"),
        (chunk(logits=LogitDeviation(1, 1, LIMITS.flip_margin + 0.01)), "lost its lead"),
    ],
)
def test_each_limit_fails_by_itself_and_is_named(bad: ChunkDeviation, reason: str) -> None:
    finding = judge(Deviation((chunk(), bad)))
    assert finding.verdict is Verdict.FAIL
    assert reason in finding.reason


def test_the_first_token_has_a_limit_of_its_own() -> None:
    assert verdict_on(chunk(), first=LIMITS.first) is Verdict.PASS
    assert verdict_on(chunk(), first=LIMITS.first + 1) is Verdict.FAIL


def test_a_number_that_is_none_fails() -> None:
    assert verdict_on(chunk(median=math.nan)) is Verdict.FAIL
    assert verdict_on(chunk(worst=math.nan)) is Verdict.FAIL
    assert verdict_on(chunk(shared=math.nan)) is Verdict.FAIL
    assert verdict_on(chunk(logits=LogitDeviation(math.nan, 1, 0))) is Verdict.FAIL
    assert verdict_on(chunk(), first=math.nan) is Verdict.FAIL


def test_between_fair_and_false_lies_suspect() -> None:
    between = (LIMITS.suspect + LIMITS.chunk) / 2
    finding = judge(Deviation((chunk(between),)))
    assert finding.verdict is Verdict.SUSPECT
    assert f"{LIMITS.suspect:g} is the limit" in finding.reason


def test_few_tokens_cannot_pass_but_can_fail() -> None:
    few = LIMITS.least_tokens - 1
    assert verdict_on(chunk(tokens=few)) is Verdict.INCONCLUSIVE
    assert verdict_on(chunk(tokens=few, worst=LIMITS.token + 1)) is Verdict.FAIL
    assert verdict_on(chunk(tokens=few, median=LIMITS.token)) is Verdict.FAIL
    assert verdict_on() is Verdict.INCONCLUSIVE
    assert verdict_on(first=LIMITS.first + 1) is Verdict.FAIL


def test_the_fewer_tokens_the_further_their_median_may_stray() -> None:
    assert verdict_on(chunk(median=LIMITS.chunk + 0.1, tokens=LIMITS.least_tokens)) is not Verdict.FAIL
    assert verdict_on(chunk(upper=LIMITS.upper + 1, tokens=LIMITS.full_chunk - 1)) is not Verdict.FAIL


def test_tokens_that_round_alike_say_as_little_as_few_of_them() -> None:
    """A text that repeats itself is one throw of the dice: nobody is banned, and nobody praised, for it."""
    repeated = chunk(median=1.4, upper=LIMITS.upper + 0.1, shared=1.9, alike=1.0)
    finding = judge(Deviation((repeated, repeated)))
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert (
        finding.reason == "64 tokens, so much alike that they count as 2.0, are too few to tell; 8 would do"
    )
    assert verdict_on(chunk(median=1.4)) is Verdict.FAIL
    assert verdict_on(*2 * [chunk(shared=0.6, alike=0.25)]) is Verdict.PASS
    assert verdict_on(chunk(worst=LIMITS.token + 1, alike=1.0)) is Verdict.FAIL


def test_without_logits_it_is_said_that_they_were_not_checked() -> None:
    finding = judge(Deviation((chunk(), chunk(logits=None))))
    assert finding.verdict is Verdict.PASS
    assert not finding.logits_checked
    assert "logits was not checked" in finding.reason


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20), st.floats(0, 20), st.integers(1, 47)), max_size=4),
    st.integers(0, 3),
    st.floats(1, 10),
)
def test_deviating_more_never_helps(
    numbers: list[tuple[float, float, float, int]], which: int, factor: float
) -> None:
    order = [Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.SUSPECT, Verdict.FAIL]
    chunks = [chunk(*each) for each in numbers]
    before = verdict_on(*chunks)
    if which < len(chunks):
        worse = [value * factor for value in numbers[which][:3]]
        chunks[which] = chunk(worse[0], worse[1], worse[2], numbers[which][3])
    assert order.index(verdict_on(*chunks)) >= order.index(before)
