"""The test of small lies: its bound holds for whoever is honest, and who lies a little is found."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.models.verify.deviation import ChunkDeviation, Deviation, LogitDeviation
from p2pinfer.reputation.account import NEWCOMER, after_small_lies, merged
from p2pinfer.reputation.config import LedgerConfig
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.small_lies import (
    BET,
    FALSE_BANS,
    HONEST_MEAN,
    POOL_TOKENS,
    Sample,
    SmallLies,
    sample_of,
)
from p2pinfer.reputation.verdict import Verdict

FAIR = Sample(32, 1, 32, 0)
HALF_INT8 = Sample(32, 12, 32, 0)
CACHE_IN_INT8 = Sample(32, 4, 32, 0, 11)  # its typical tokens lie between those of honest peers and the limit
NEXT_LIKELIEST = Sample(32, 1, 32, 8)
SHORT = Sample(4, 2, 4, 0)


def rounds_until_guilty(*samples: Sample, honest: int = 0, most: int = 200) -> int:
    state = SmallLies()
    for _ in range(honest):
        state = state.after(FAIR)
    for number in range(1, most + 1):
        for each in samples:
            state = state.after(each)
        if state.is_guilty:
            return number
    return most + 1


def chunk(tokens: int, high: int, lost: int = 0, alike: float = 0.1, typical: float = 1.0) -> ChunkDeviation:
    logits = LogitDeviation(1.0, 1.5, 0.0, lost)
    return ChunkDeviation(1, 1 + tokens, tokens, typical, 1.2, 1.5, 0.1, logits, alike, high)


@pytest.mark.parametrize("lie", [HALF_INT8, NEXT_LIKELIEST])
def test_a_small_lie_in_every_session_is_found_within_ten(lie: Sample) -> None:
    assert rounds_until_guilty(lie) <= 10
    assert rounds_until_guilty(FAIR) > 200


def test_short_answers_are_put_together() -> None:
    assert rounds_until_guilty(SHORT) <= 10 * POOL_TOKENS / SHORT.tokens
    assert SmallLies().after(SHORT).high.rounds == 0


def test_who_lies_after_a_long_honest_time_is_found_a_little_later() -> None:
    assert rounds_until_guilty(HALF_INT8, honest=2000) <= rounds_until_guilty(HALF_INT8) + 10


def test_typical_tokens_that_are_always_suspect_are_found_and_honest_ones_are_not() -> None:
    """A single session between the limits blames nobody. Other software reaches 1.20, and stays there."""
    assert rounds_until_guilty(CACHE_IN_INT8) <= 15
    for typical, guilty in ((1.2, False), (1.26, True), (1.35, True)):
        sample = sample_of(Deviation((chunk(32, 0, typical=typical),)))
        assert (sample.beyond > 0) is guilty
        assert (rounds_until_guilty(sample, most=30) <= 30) is guilty


def test_few_tokens_have_room_for_their_typical_one() -> None:
    sample = sample_of(Deviation((chunk(8, 0, typical=1.9),)))
    assert sample.beyond == 0


def test_short_sessions_pass_together_and_not_where_they_lie() -> None:
    for high, passes in ((0, 8), (1, 0)):
        account = NEWCOMER
        for _ in range(48):
            account = after_small_lies(account, Sample(4, high, 4, 0), 1.0, LedgerConfig(), is_short=True)
        assert account.passed == passes
    account = NEWCOMER
    for _ in range(48):
        account = after_small_lies(account, Sample(32, 0, 32, 0), 1.0, LedgerConfig())
    assert account.passed == 0  # those have verdicts of their own


def test_who_lies_in_one_session_of_three_is_found() -> None:
    assert rounds_until_guilty(HALF_INT8, FAIR, FAIR) <= 100


def test_each_bet_is_fair_for_who_is_as_bad_as_an_honest_peer_can_be() -> None:
    """Ville's inequality needs no more: the wealth's mean grows by the stakes alone."""
    for share in (0.0, HONEST_MEAN, 1.0):
        up, down = 1 + BET * (1 - HONEST_MEAN), 1 - BET * HONEST_MEAN
        assert down > 0
        mean = share * up + (1 - share) * down
        assert mean == pytest.approx(1 + BET * (share - HONEST_MEAN))
    assert HONEST_MEAN * up + (1 - HONEST_MEAN) * down == pytest.approx(1)
    assert sum(1 / (n * (n + 1)) for n in range(1, 10_000)) < 1


def test_honest_peers_at_the_bound_are_rarely_even_suspect() -> None:
    """4,000 peers of 100 sessions, in a twentieth of which all tokens deviate, in whatever order."""
    rng = random.Random(0)
    most: list[float] = []
    for _ in range(4000):
        state = SmallLies()
        highest = 0.0
        for _ in range(100):
            state = state.after(Sample(32, 32 if rng.random() < HONEST_MEAN else 0, 0, 0))
            highest = max(highest, state.wealth)
        most.append(highest)
    assert not any(each * FALSE_BANS >= 1 for each in most)
    for level in (10, 100):
        assert sum(each >= level for each in most) / len(most) < 1 / level


def test_tokens_that_round_alike_count_as_few() -> None:
    once = sample_of(Deviation((chunk(32, 32, alike=1.0),)))
    assert once.tokens == pytest.approx(1.0)
    assert once.high == pytest.approx(1.0)
    many = sample_of(Deviation((chunk(32, 3, 2), chunk(30, 0))))
    assert (many.tokens, many.high, many.with_logits, many.lost) == (62, 3, 62, 2)
    doubt = Deviation((replace(chunk(30, 9), undecided=2), replace(chunk(32, 9), clouded=True)))
    assert sample_of(doubt) == Sample()


def test_the_rate_of_audits_rises_before_the_verdict_falls() -> None:
    ledger, rates = Ledger(), list[float]()
    for _ in range(30):
        ledger.record_audit("peer", Verdict.PASS, 1.0)
        ledger.record_small_lies("peer", FAIR, 1.0)
    assert ledger.account("peer").small_lies.suspicion == 0
    usual = ledger.audit_probability("peer", 1.0)
    while not ledger.is_banned("peer"):
        ledger.record_audit("peer", Verdict.PASS, 1.0)
        ledger.record_small_lies("peer", HALF_INT8, 1.0)
        rates.append(ledger.audit_probability("peer", 1.0))
        assert len(rates) < 40
    rising = [rate for rate in rates if rate > 1.1 * usual]  # a pass more lowers the rate a little
    assert rising == sorted(rising) == rates[-len(rising) :]
    assert len(rising) > 3
    assert rates[-2] > 10 * usual
    ban = ledger.account("peer").ban
    assert ban is not None and ban.by == "audits"
    assert "small deviations" in ban.why
    assert any("small deviations" in line for line in ledger.explain("peer"))


def test_forgiving_and_merging_keep_it_with_the_audits() -> None:
    ledger, config = Ledger(), LedgerConfig()
    for _ in range(3):
        ledger.record_audit("peer", Verdict.PASS, 1.0)
        ledger.record_small_lies("peer", HALF_INT8, 1.0)
    account = ledger.account("peer")
    assert account.small_lies.suspicion > 0
    assert merged(NEWCOMER, account).small_lies == account.small_lies
    assert merged(account, account).small_lies == account.small_lies
    ledger.forgive("peer")
    assert ledger.account("peer").small_lies == SmallLies()
    vouched = ledger.account("peer")
    assert after_small_lies(vouched, Sample(), 2.0, config).small_lies == SmallLies()


@given(
    st.lists(st.tuples(st.floats(0, 500), st.floats(0, 1), st.floats(0, 500), st.floats(0, 1)), max_size=30)
)
def test_whatever_is_measured_the_state_stays_in_its_bounds(
    numbers: list[tuple[float, float, float, float]],
) -> None:
    state = SmallLies()
    for tokens, high, seen, lost in numbers:
        state = state.after(Sample(tokens, tokens * high, seen, seen * lost))
    assert math.isfinite(state.wealth)
    assert state.wealth >= 0
    assert 0 <= state.suspicion <= 1
