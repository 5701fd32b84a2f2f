import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.reputation.ledger import Ledger, LedgerConfig
from p2pinfer.reputation.view import ReputationView

HOUR_S = 3600.0

# (good, seconds since the previous event)
histories = st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=150)


def reliability_after(history: list[tuple[bool, float]], config: LedgerConfig | None = None) -> float:
    ledger, now = Ledger(config), 0.0
    for good, pause_s in history:
        now += pause_s
        (ledger.record_success if good else ledger.record_failure)("peer", now)
    return ledger.score("peer").reliability


def test_a_newcomer_scores_the_prior() -> None:
    view: ReputationView = Ledger(LedgerConfig(reliability_prior=(4, 1), integrity_prior=(1, 1)))
    assert view.score("stranger").reliability == pytest.approx(0.8)
    assert view.score("stranger").integrity == pytest.approx(0.5)
    assert not view.is_banned("stranger")


@given(histories)
def test_scores_stay_between_zero_and_one(history: list[tuple[bool, float]]) -> None:
    assert 0.0 <= reliability_after(history) <= 1.0


@given(histories, st.data(), st.sampled_from([3.0, 20.0, 1000.0]))
def test_scores_are_monotone_in_evidence(
    history: list[tuple[bool, float]], data: st.DataObject, max_evidence: float
) -> None:
    """One more success anywhere in the past never lowers a score, one more failure never raises it."""
    config = LedgerConfig(max_evidence=max_evidence)
    where = data.draw(st.integers(0, len(history)))
    plain = reliability_after(history, config)
    better = reliability_after([*history[:where], (True, 0.0), *history[where:]], config)
    worse = reliability_after([*history[:where], (False, 0.0), *history[where:]], config)
    assert worse <= plain + 1e-9
    assert plain <= better + 1e-9


def test_evidence_counts_half_after_the_half_life() -> None:
    ledger = Ledger(LedgerConfig(reliability_prior=(1, 1), half_life_h=10))
    for _ in range(8):
        ledger.record_success("peer", 100.0)
    assert ledger.score("peer").reliability == pytest.approx(9 / 10)
    ledger.advance(100.0 + 10 * HOUR_S)
    assert ledger.score("peer").reliability == pytest.approx(5 / 6)


def test_a_long_good_past_does_not_outweigh_a_bad_present() -> None:
    ledger = Ledger(LedgerConfig(max_evidence=100))
    for _ in range(10_000):
        ledger.record_success("peer", 0.0)
    for _ in range(100):
        ledger.record_failure("peer", 0.0)
    assert ledger.score("peer").reliability < 0.45


def test_an_event_from_the_past_does_not_turn_time_back() -> None:
    ledger = Ledger()
    ledger.record_failure("peer", 1000 * HOUR_S)
    before = ledger.score("peer").reliability
    ledger.record_success("other", 0.0)
    assert ledger.score("peer").reliability == before


def test_peers_do_not_share_evidence() -> None:
    ledger = Ledger()
    ledger.record_failure("bad", 0.0)
    assert ledger.score("bad").reliability < ledger.score("other").reliability


def test_a_ban_holds_until_it_is_forgiven_and_so_does_the_evidence() -> None:
    ledger = Ledger(banned=["early"])
    ledger.record_failure("late", 0.0)
    ledger.ban("late")
    assert ledger.is_banned("early") and ledger.is_banned("late")
    ledger.forgive("late")
    assert not ledger.is_banned("late")
    assert ledger.score("late") == ledger.score("stranger")


def test_who_the_user_vouches_for_has_full_integrity_and_is_not_banned() -> None:
    ledger = Ledger(vouched=["mine"])
    assert ledger.score("mine").integrity == 1.0
    ledger.ban("mine")
    assert ledger.score("mine").integrity < 1.0
    ledger.vouch("mine")
    assert ledger.score("mine").integrity == 1.0 and not ledger.is_banned("mine")


def test_the_longest_unseen_peer_is_forgotten_first() -> None:
    ledger = Ledger(LedgerConfig(max_peers=2))
    for peer_id in ("a", "b", "a", "c"):
        ledger.record_failure(peer_id, 0.0)
    prior = ledger.score("stranger")
    assert ledger.score("b") == prior
    assert ledger.score("a") != prior and ledger.score("c") != prior
