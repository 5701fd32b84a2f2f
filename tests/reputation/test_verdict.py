from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.models.verify.deviation import ChunkDeviation, Deviation, LogitDeviation
from p2pinfer.reputation.verdict import Limit, Thresholds, Verdict, judge

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
    finding = judge(Deviation((chunk(), chunk(1.1)), LIMITS.first.passes))
    assert finding.verdict is Verdict.PASS
    assert finding.logits_checked
    assert finding.reason == "64 tokens deviate 1.10 times as much as rounding does, or less"


Build = Callable[[float], ChunkDeviation]
FIGURES: dict[str, tuple[Limit, Build, str]] = {
    "typical": (LIMITS.chunk, lambda value: chunk(value), "the typical one of tokens 1-32"),
    "worst": (LIMITS.token, lambda value: chunk(worst=value), "the worst one of tokens 1-32"),
    "tenth": (LIMITS.upper, lambda value: chunk(upper=value), "a tenth of tokens 1-32"),
    "shared": (LIMITS.shared, lambda value: chunk(shared=value), "the common part of tokens 1-32"),
    "logits": (
        LIMITS.logit_chunk,
        lambda value: chunk(logits=LogitDeviation(value, 2, 0)),
        "by its logits, the typical one of tokens 1-32",
    ),
    "worst logits": (
        LIMITS.logit_token,
        lambda value: chunk(logits=LogitDeviation(1, value, 0)),
        "by its logits, the worst one of tokens 1-32",
    ),
    "lead": (
        LIMITS.flip_margin,
        lambda value: chunk(logits=LogitDeviation(1, 1, value)),
        "among tokens 1-32 one that led",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_each_limit_blames_by_itself_and_is_named_and_between_its_bounds_nobody_is(name: str) -> None:
    limit, build, reason = FIGURES[name]
    for value, verdict in (
        (limit.passes, Verdict.PASS),
        (limit.passes * 1.001, Verdict.SUSPECT),
        (limit.fails, Verdict.SUSPECT),
        (limit.fails * 1.001, Verdict.FAIL),
    ):
        finding = judge(Deviation((chunk(), build(value))))
        assert finding.verdict is verdict
        assert verdict is Verdict.PASS or reason in finding.reason


def test_two_processors_that_measure_a_little_differently_never_say_pass_and_fail() -> None:
    """The same output measured 5 % apart, wherever it lies; a peer that accuses is no liar for it."""
    for limit, build, _ in FIGURES.values():
        for step in range(400):
            value = limit.passes * 0.8 + step * limit.passes / 300
            both = {verdict_on(build(value * 0.975)), verdict_on(build(value * 1.025))}
            assert both != {Verdict.PASS, Verdict.FAIL}


def test_every_limit_has_room_between_its_bounds() -> None:
    limits = [value for each in fields(LIMITS) if isinstance(value := getattr(LIMITS, each.name), Limit)]
    assert len(limits) == len(FIGURES) + 1
    assert all(limit.fails > 1.15 * limit.passes for limit in limits)


def test_the_first_token_has_a_limit_of_its_own() -> None:
    assert verdict_on(chunk(), first=LIMITS.first.passes) is Verdict.PASS
    assert verdict_on(chunk(), first=LIMITS.first.fails) is Verdict.SUSPECT
    assert verdict_on(chunk(), first=LIMITS.first.fails + 1) is Verdict.FAIL


def test_a_number_that_is_none_fails() -> None:
    assert verdict_on(chunk(median=math.nan)) is Verdict.FAIL
    assert verdict_on(chunk(worst=math.nan)) is Verdict.FAIL
    assert verdict_on(chunk(shared=math.nan)) is Verdict.FAIL
    assert verdict_on(chunk(logits=LogitDeviation(math.nan, 1, 0))) is Verdict.FAIL
    assert verdict_on(chunk(), first=math.nan) is Verdict.FAIL


def test_few_tokens_cannot_pass_but_can_fail() -> None:
    few = LIMITS.least_tokens - 1
    assert verdict_on(chunk(tokens=few)) is Verdict.INCONCLUSIVE
    assert verdict_on(chunk(tokens=few, worst=LIMITS.token.fails + 1)) is Verdict.FAIL
    assert verdict_on(chunk(tokens=few, median=LIMITS.token.fails)) is Verdict.FAIL
    assert verdict_on() is Verdict.INCONCLUSIVE
    assert verdict_on(first=LIMITS.first.fails + 1) is Verdict.FAIL


def test_the_fewer_tokens_the_further_their_median_may_stray() -> None:
    assert verdict_on(chunk(median=LIMITS.chunk.fails + 0.1, tokens=LIMITS.least_tokens)) is not Verdict.FAIL
    assert verdict_on(chunk(upper=LIMITS.upper.fails + 1, tokens=LIMITS.full_chunk - 1)) is not Verdict.FAIL


def test_chunks_that_are_too_few_alone_are_judged_together() -> None:
    """Two words in turn: each chunk counts as five to eight tokens, a session as more than twenty."""
    alternating = chunk(alike=0.24)
    assert verdict_on(alternating) is Verdict.INCONCLUSIVE
    assert verdict_on(*4 * [alternating]) is Verdict.PASS
    assert verdict_on(*3 * [alternating], chunk(median=4.0, alike=0.24)) is Verdict.FAIL


def test_tokens_that_round_alike_say_as_little_as_few_of_them() -> None:
    """A text that repeats itself is one throw of the dice: nobody is banned, and nobody praised, for it."""
    repeated = chunk(median=1.5, upper=LIMITS.upper.passes + 0.1, shared=1.9, alike=1.0)
    finding = judge(Deviation((repeated, repeated)))
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert (
        finding.reason == "64 tokens, so much alike that they count as 2.0, are too few to tell; 8 would do"
    )
    assert verdict_on(chunk(median=1.5)) is Verdict.FAIL
    assert verdict_on(*2 * [chunk(shared=0.55, alike=0.25)]) is Verdict.PASS
    assert verdict_on(chunk(worst=LIMITS.token.fails + 1, alike=1.0)) is Verdict.FAIL


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


def test_tokens_that_lie_between_two_experts_say_nothing_where_they_are_many() -> None:
    most = 24
    assert verdict_on(chunk(), replace(chunk(), rerouted=most)) is Verdict.PASS
    assert verdict_on(chunk(), replace(chunk(), rerouted=most + 1)) is Verdict.INCONCLUSIVE
    assert verdict_on(chunk(), replace(chunk(median=9, worst=99), rerouted=most + 1)) is Verdict.INCONCLUSIVE
    assert verdict_on(chunk(median=9), replace(chunk(), rerouted=most + 1)) is Verdict.FAIL


def test_behind_an_undecided_token_the_typical_one_counts_and_the_worst_does_not() -> None:
    clouded = replace(chunk(worst=99.0, upper=99.0, shared=9.0), tokens=30, undecided=2, clouded=True)
    assert verdict_on(clouded) is Verdict.PASS
    assert verdict_on(replace(clouded, median_rho=9.0)) is Verdict.FAIL
    assert verdict_on(replace(clouded, clouded=False)) is Verdict.FAIL
