import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.reputation.account import MAX_NOTES, MAX_REASON
from p2pinfer.reputation.ledger import Ledger, LedgerConfig, open_ledger
from p2pinfer.reputation.score import Score
from p2pinfer.reputation.verdict import Verdict
from p2pinfer.reputation.view import ReputationView

from .support import audit

HOUR_S = 3600.0

# (good, seconds since the previous event)
histories = st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=150)
verdicts = st.lists(st.sampled_from(list(Verdict)), max_size=60)


def reliability_after(history: list[tuple[bool, float]], config: LedgerConfig | None = None) -> float:
    ledger, now = Ledger(config), 0.0
    for good, pause_s in history:
        now += pause_s
        (ledger.record_success if good else ledger.record_failure)("peer", now)
    return ledger.score("peer").reliability


def integrity_after(history: list[Verdict]) -> float:
    ledger = Ledger()
    for verdict in history:
        ledger.record_audit("peer", verdict, 1.0)
    return ledger.score("peer").integrity


# ---------------------------------------------------------------------- reliability


def test_a_newcomer_scores_the_prior() -> None:
    view: ReputationView = Ledger(LedgerConfig(reliability_prior=(4, 1)))
    score = view.score("stranger")
    assert score.reliability == pytest.approx(0.8)
    assert score.integrity == pytest.approx(0.05)
    assert score.is_newcomer
    assert score.at_best == Score(1.0, 1.0)
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


def test_a_timeout_never_touches_integrity_nor_an_audit_reliability() -> None:
    ledger = Ledger()
    before = ledger.score("peer")
    ledger.record_failure("peer", 0.0, "vanished")
    assert ledger.score("peer").integrity == before.integrity
    after = ledger.score("peer")
    audit(ledger, "peer", Verdict.PASS, now=0.0)
    assert ledger.score("peer").reliability == after.reliability
    assert ledger.score("peer").integrity > after.integrity


# ---------------------------------------------------------------------- integrity


@pytest.mark.parametrize("passes", [0, 1, 5, 20, 100])
def test_integrity_is_the_five_percent_quantile(passes: int) -> None:
    """Of Beta(1 + n, 1) that is 0.05 ** (1 / (n + 1)); forgetting takes a little of n."""
    assert integrity_after([Verdict.PASS] * passes) == pytest.approx(0.05 ** (1 / (passes + 1)), abs=5e-3)


@given(verdicts, st.data())
def test_integrity_is_bounded_and_monotone_in_verdicts(history: list[Verdict], data: st.DataObject) -> None:
    where = data.draw(st.integers(0, len(history)))
    plain = integrity_after(history)
    assert 0.0 <= plain <= 1.0
    assert integrity_after([*history[:where], Verdict.FAIL, *history[where:]]) <= plain + 1e-9
    assert integrity_after([*history, Verdict.PASS]) >= plain - 1e-3


@given(verdicts)
def test_suspect_and_inconclusive_never_punish(history: list[Verdict]) -> None:
    silent: list[Verdict] = [each for each in history if each in (Verdict.PASS, Verdict.FAIL)]
    assert integrity_after(history) == integrity_after(silent)


def test_a_newcomer_that_fails_once_is_banned_and_an_old_hand_is_not() -> None:
    ledger = Ledger()
    audit(ledger, "new", Verdict.FAIL)
    assert ledger.is_banned("new")
    audit(ledger, "old", Verdict.PASS, 100)
    audit(ledger, "old", Verdict.FAIL)
    assert not ledger.is_banned("old") and not ledger.is_newcomer("old")
    assert ledger.score("old").integrity < 0.9
    audit(ledger, "old", Verdict.FAIL, 25)
    assert ledger.is_banned("old")


def test_at_best_who_never_failed_is_honest_and_who_did_is_not() -> None:
    ledger = Ledger()
    audit(ledger, "peer", Verdict.PASS, 100)
    at_best = ledger.score("peer").at_best
    assert at_best is not None and at_best.integrity == 1.0
    audit(ledger, "peer", Verdict.FAIL)
    score = ledger.score("peer")
    assert score.at_best is not None
    assert score.integrity < score.at_best.integrity < 0.97


def test_a_failure_is_a_suspicion_until_it_is_confirmed(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    ledger.record_audit("peer", Verdict.FAIL, 1.0, confirmed=False)
    assert not ledger.is_banned("peer") and ledger.account("peer").suspected == 1
    with caplog.at_level(logging.WARNING):
        ledger.record_audit("peer", Verdict.FAIL, 1.0, why="int8 weights")
    assert ledger.is_banned("peer")
    assert caplog.messages == ["peer is banned: int8 weights"]


def test_suspicion_is_a_running_mean_that_raises_the_audit_rate_and_wears_off() -> None:
    ledger = Ledger()
    audit(ledger, "peer", Verdict.PASS, 200)
    calm = ledger.audit_probability("peer", 1.0)
    audit(ledger, "peer", Verdict.SUSPECT, 20)
    assert ledger.account("peer").suspicion == pytest.approx(1 - 0.9**20)
    assert ledger.audit_probability("peer", 1.0) > 0.85
    audit(ledger, "peer", Verdict.PASS, 60)
    assert ledger.audit_probability("peer", 1.0) == pytest.approx(calm, abs=5e-3)


def test_withheld_evidence_is_a_failure_of_reliability() -> None:
    ledger = Ledger()
    before = ledger.score("peer")
    ledger.record_audit("peer", Verdict.INCONCLUSIVE, 1.0)
    assert ledger.score("peer") == before
    ledger.record_audit("peer", Verdict.INCONCLUSIVE, 1.0, withheld=True)
    after = ledger.score("peer")
    assert after.reliability < before.reliability and after.integrity == before.integrity
    assert ledger.account("peer").withheld == 1


@pytest.mark.parametrize(("passes", "rate"), [(0, 1.0), (8, 0.0364), (12, 0.0318), (40, 0.03), (5000, 0.03)])
def test_the_audit_rate_falls_with_what_was_passed(passes: int, rate: float) -> None:
    ledger = Ledger()
    audit(ledger, "peer", Verdict.PASS, passes)
    assert ledger.audit_probability("peer", 1.0) == pytest.approx(rate, rel=0.02)


def test_newcomers_are_audited_in_every_session() -> None:
    ledger = Ledger()
    audit(ledger, "peer", Verdict.PASS, 7)
    assert ledger.is_newcomer("peer") and ledger.audit_probability("peer", 1.0) == 1.0
    audit(ledger, "peer", Verdict.PASS)
    assert not ledger.is_newcomer("peer") and ledger.audit_probability("peer", 1.0) < 0.1


# ---------------------------------------------------------------------- the user's word


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
    assert not ledger.is_newcomer("mine") and ledger.audit_probability("mine", 0.0) == 0.03
    ledger.ban("mine")
    assert ledger.score("mine").integrity < 1.0
    ledger.vouch("mine")
    assert ledger.score("mine").integrity == 1.0 and not ledger.is_banned("mine")


def test_a_users_ban_replaces_the_reason_and_nothing_else_does() -> None:
    ledger = Ledger()
    ledger.add_proof("address", "peer", 1.0, verified=True, why="skipped a block")
    audit(ledger, "peer", Verdict.FAIL)
    ban = ledger.account("peer").ban
    assert ban is not None and ban.by == "proof" and "skipped a block" in ban.why
    ledger.ban("peer", "rude")
    ban = ledger.account("peer").ban
    assert ban is not None and (ban.by, ban.why) == ("user", "rude")


# ---------------------------------------------------------------------- bounds


def test_notes_are_few_and_short() -> None:
    ledger = Ledger()
    for number in range(20):
        ledger.record_failure("peer", 0.0, f"{number} " + "no \n" * 1000)
    notes = ledger.account("peer").notes
    assert [note.text.split()[0] for note in notes] == [str(n) for n in range(20 - MAX_NOTES, 20)]
    assert all(len(note.text) == MAX_REASON and "\n" not in note.text for note in notes)


def test_a_stranger_is_one_until_it_passes_an_audit() -> None:
    ledger = Ledger()
    assert ledger.score("peer").is_stranger
    audit(ledger, "peer", Verdict.SUSPECT)
    assert ledger.score("peer").is_stranger
    audit(ledger, "peer", Verdict.PASS)
    assert not ledger.score("peer").is_stranger and ledger.score("peer").is_newcomer


def test_where_a_banned_peer_was_is_remembered_for_a_week_and_of_others_nothing_is() -> None:
    ledger, week = Ledger(), 7 * 86400.0
    ledger.note_ranges("honest", ["192.0.2.0/24"], 5.0)
    assert ledger.spoilt_ranges(5.0) == frozenset() and not ledger.account("honest").ranges
    ledger.ban("bad", "rude", 10.0)
    ledger.note_ranges("bad", [f"10.0.{n}.0/24" for n in range(9)], 20.0)
    assert len(ledger.spoilt_ranges(20.0)) == 4  # it may announce any number of addresses
    ledger.note_ranges("bad", ["203.0.113.0/24"], 30.0)
    assert ledger.spoilt_ranges(10.0 + week) == {"203.0.113.0/24"}
    assert ledger.spoilt_ranges(11.0 + week) == frozenset()


@pytest.mark.parametrize("pardon", [Ledger.forgive, Ledger.vouch])
def test_who_is_pardoned_spoils_nothing(pardon: Callable[[Ledger, str], None]) -> None:
    ledger = Ledger(banned=["bad"])
    ledger.note_ranges("bad", ["203.0.113.0/24"], 0.0)
    assert ledger.spoilt_ranges(0.0)
    pardon(ledger, "bad")
    assert not ledger.spoilt_ranges(0.0) and not ledger.account("bad").ranges


# ---------------------------------------------------------------------- the data directory


def test_without_a_place_for_it_the_ledger_is_in_memory_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    ledger = open_ledger(tmp_path / "file", warn=said.append)
    assert len(said) == 1 and "what is learnt about peers will be forgotten" in said[0]
    ledger.record_success("a", 1.0)
    ledger.close()
    kept = open_ledger(tmp_path / "folder", warn=said.append)
    kept.close()
    assert len(said) == 1 and (tmp_path / "folder" / "ledger.sqlite").exists()
