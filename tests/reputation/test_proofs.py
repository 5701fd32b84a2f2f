"""Proofs are fetched once, from whom one may believe, and not more than one can check."""

import pytest

from p2pinfer.reputation.ledger import Ledger, LedgerConfig
from p2pinfer.reputation.proofs import ProofDecision, sender_standing

HOUR_S = 3600.0


def test_a_verified_proof_bans_and_is_not_fetched_again() -> None:
    ledger = Ledger()
    assert ledger.weigh_proof("p1", "cheat", "witness", 1.0) is ProofDecision.FETCH
    ledger.add_proof("p1", "cheat", 2.0, verified=True, sender="witness", why="blocks 3:5 differ")
    assert ledger.is_banned("cheat")
    ban = ledger.account("cheat").ban
    assert ban is not None and ban.by == "proof" and "blocks 3:5 differ" in ban.why
    assert ledger.weigh_proof("p1", "cheat", "other", 3.0) is ProofDecision.KNOWN
    assert ledger.weigh_proof("p2", "cheat", "other", 3.0) is ProofDecision.NEEDLESS
    assert ledger.proofs()["p1"].state == "verified"
    assert ledger.account("witness").proofs_verified == 1


def test_a_false_proof_costs_its_sender_and_not_the_accused() -> None:
    ledger = Ledger()
    before = ledger.score("honest")
    ledger.add_proof("p1", "honest", 1.0, verified=False, sender="liar")
    assert ledger.score("honest") == before and not ledger.is_banned("honest")
    assert sender_standing(ledger.account("liar")) == pytest.approx(1 / 3)
    assert ledger.weigh_proof("p2", "honest", "liar", HOUR_S) is ProofDecision.FETCH
    ledger.add_proof("p2", "honest", HOUR_S, verified=False, sender="liar")
    assert ledger.weigh_proof("p3", "honest", "liar", 2 * HOUR_S) is ProofDecision.DISTRUSTED
    assert not ledger.is_banned("liar")


def test_true_proofs_outweigh_a_false_one() -> None:
    ledger = Ledger()
    for number in range(4):
        ledger.add_proof(f"t{number}", f"cheat{number}", 1.0, verified=True, sender="witness")
    ledger.add_proof("f", "honest", 1.0, verified=False, sender="witness")
    assert ledger.weigh_proof("next", "somebody", "witness", 1.0) is ProofDecision.FETCH


def test_what_was_checked_stays_checked() -> None:
    ledger = Ledger()
    ledger.add_proof("p1", "honest", 1.0, verified=False, sender="liar")
    ledger.add_proof("p1", "honest", 2.0, verified=True, sender="liar")
    assert not ledger.is_banned("honest")
    assert ledger.account("liar").proofs_verified == 0


def test_a_proof_that_could_not_be_had_may_come_from_another() -> None:
    ledger = Ledger()
    assert ledger.weigh_proof("p1", "cheat", "gone", 1.0) is ProofDecision.FETCH
    assert ledger.weigh_proof("p1", "cheat", "gone", 2.0) is ProofDecision.KNOWN
    assert ledger.weigh_proof("p1", "cheat", "other", 3.0) is ProofDecision.FETCH
    assert ledger.weigh_proof("p1", "cheat", "other", 4.0 + HOUR_S) is ProofDecision.FETCH


def test_a_sender_has_an_allowance_by_the_hour() -> None:
    ledger = Ledger(LedgerConfig(proofs_per_hour=3))
    said = [ledger.weigh_proof(f"p{n}", f"c{n}", "keen", float(n)) for n in range(5)]
    assert said == [ProofDecision.FETCH] * 3 + [ProofDecision.TOO_MANY] * 2
    assert ledger.weigh_proof("p9", "c9", "keen", HOUR_S + 2.5) is ProofDecision.FETCH


def meet(ledger: Ledger, *peer_ids: str) -> None:
    for peer_id in peer_ids:
        ledger.record_success(peer_id, 0.0)


def checked(ledger: Ledger, address: str, accused: str, sender: str, now: float, *, verified: bool) -> bool:
    """Fetch and check a proof if that is allowed; whether it was."""
    if ledger.weigh_proof(address, accused, sender, now) is not ProofDecision.FETCH:
        return False
    ledger.add_proof(address, accused, now, verified=verified, sender=sender)
    return True


def test_a_flood_of_strangers_leaves_room_for_who_proved_something() -> None:
    ledger = Ledger(LedgerConfig(max_proofs_per_hour=10))
    meet(ledger, "cheat")
    ledger.add_proof("true", "cheat", 1.0, verified=True, sender="witness")
    flood = [checked(ledger, f"p{n}", f"c{n}", f"stranger{n}", 2.0, verified=True) for n in range(20)]
    assert sum(flood) == 10
    assert ledger.weigh_proof("p", "c", "witness", 3.0) is ProofDecision.FETCH


def test_who_accuses_its_own_keys_does_not_become_a_known_sender_by_it() -> None:
    ledger = Ledger(LedgerConfig(max_proofs_per_hour=10))
    flood = [checked(ledger, f"p{n}", f"own{n}", f"sender{n % 3}", 1.0, verified=True) for n in range(60)]
    assert sum(flood) == 10
    assert ledger.account("sender0").proofs_verified and not ledger.account("sender0").proofs_useful


def test_proofs_about_peers_that_were_met_are_not_kept_out_by_those_about_strangers() -> None:
    """Nor the other way round, and of a sender only what was of no use counts."""
    ledger = Ledger(LedgerConfig(max_proofs_per_hour=10))
    meet(ledger, *(f"met{n}" for n in range(30)))
    for number in range(20):
        checked(ledger, f"s{number}", f"own{number}", f"stranger{number}", 1.0, verified=True)
    assert ledger.weigh_proof("no", "another", "new", 1.0) is ProofDecision.TOO_MANY
    assert all(checked(ledger, f"m{n}", f"met{n}", "witness", 1.0, verified=True) for n in range(20))


def test_seventy_notices_of_nothing_lock_nobody_out() -> None:
    ledger = Ledger()
    for number in range(70):
        ledger.weigh_proof(f"nothing{number}", f"nobody{number}", f"stranger{number}", 1.0 + number)
    assert ledger.weigh_proof("true", "cheat", "another stranger", 80.0) is ProofDecision.FETCH
    assert ledger.may_examine("true", "cheat", "another stranger", 90.0)


def test_notices_of_nothing_take_no_place_of_proofs_that_were_checked() -> None:
    ledger = Ledger(LedgerConfig(max_proofs=3))
    ledger.add_proof("true", "cheat", 1.0, verified=True, sender="witness")
    for number in range(2000):
        ledger.weigh_proof(f"nothing{number}", f"nobody{number}", f"stranger{number}", 2.0)
    assert ledger.proofs()["true"].state == "verified" and len(ledger.proofs()) < 1100


def test_what_was_checked_by_a_clock_that_was_ahead_uses_up_no_allowance() -> None:
    year_s = 365 * 86400.0
    ledger = Ledger(LedgerConfig(max_proofs_per_hour=10))
    for number in range(10):
        checked(ledger, f"p{number}", f"own{number}", f"stranger{number}", year_s, verified=True)
    assert ledger.weigh_proof("p", "c", "sender", year_s) is ProofDecision.TOO_MANY
    assert ledger.weigh_proof("p", "c", "sender", 1.0) is ProofDecision.FETCH


def test_a_flood_of_false_proofs_shrinks_what_strangers_are_granted_for_an_hour() -> None:
    """Each false one costs a re-execution, whoever sent it; 60 an hour are granted otherwise."""
    ledger = Ledger()
    checked = 0
    for number in range(200):
        decision = ledger.weigh_proof(f"p{number}", "honest", f"liar{number}", 1.0)
        if decision is ProofDecision.FETCH:
            ledger.add_proof(f"p{number}", "honest", 1.0, verified=False, sender=f"liar{number}")
            checked += 1
    assert 6 <= checked <= 15
    assert ledger.weigh_proof("later", "honest", "another", 3602.0) is ProofDecision.FETCH


def test_true_proofs_keep_the_strangers_allowance_large() -> None:
    ledger = Ledger()
    for number in range(40):
        assert ledger.weigh_proof(f"p{number}", f"bad{number}", f"new{number}", 1.0) is ProofDecision.FETCH
        ledger.add_proof(f"p{number}", f"bad{number}", 1.0, verified=True, sender=f"new{number}")


def test_known_senders_have_an_allowance_too() -> None:
    ledger = Ledger(LedgerConfig(max_proofs_per_hour=4))
    meet(ledger, *(f"cheat{number}" for number in range(4)))
    for number in range(4):
        ledger.add_proof(
            f"t{number}", f"cheat{number}", -2 * HOUR_S, verified=True, sender=f"witness{number}"
        )
    said = [checked(ledger, f"p{n}", f"c{n}", f"witness{n}", 1.0, verified=False) for n in range(4)]
    assert said.count(True) == 2


def test_only_so_many_addresses_are_remembered() -> None:
    ledger = Ledger(LedgerConfig(max_proofs=3))
    for number in range(5):
        ledger.add_proof(f"p{number}", f"c{number}", float(number), verified=True)
    assert list(ledger.proofs()) == ["p2", "p3", "p4"]
    assert ledger.is_banned("c0")
