"""Who keeps a place in the ledger: what was observed here goes for nobody's word."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pinfer.reputation.account import Account, Ban
from p2pinfer.reputation.ledger import Ledger, LedgerConfig
from p2pinfer.reputation.proofs import ProofDecision
from p2pinfer.reputation.roster import Rank, Roster, rank_of
from p2pinfer.reputation.verdict import Verdict

NOW = 1e9
HOUR_S, WEEK_S, YEAR_S = 3600.0, 7 * 86400.0, 365 * 86400.0


def ledger_of_honest(config: LedgerConfig, count: int = 20) -> Ledger:
    """A ledger with so many peers that passed audits, and one liar that a stranger told of."""
    ledger = Ledger(config)
    for number in range(count):
        for _ in range(10):
            ledger.record_audit(f"honest{number}", Verdict.PASS, NOW)
    ledger.add_proof("true", "liar", NOW, verified=True, sender="somebody")
    return ledger


def accuse_own_keys(ledger: Ledger, count: int, every_s: float, senders: int) -> int:
    """True proofs of throw-away keys, each checked if that is allowed; returns how many were refused."""
    refused = 0
    for number in range(count):
        now, sender = NOW + number * every_s, f"sender{number % senders}"
        decision = ledger.weigh_proof(f"p{number}", f"own{number}", sender, now)
        if decision is ProofDecision.FETCH:
            ledger.add_proof(f"p{number}", f"own{number}", now, verified=True, sender=sender)
        else:
            refused += 1
    return refused


@pytest.mark.parametrize(
    ("every_s", "senders"),
    [(1 / 7, 3), (1 / 7, 600), (120.0, 600)],
    ids=["three senders, seven a second", "a sender for each", "slowly, for a day"],
)
def test_self_accusations_cost_no_honest_record_and_lift_no_ban(every_s: float, senders: int) -> None:
    ledger = ledger_of_honest(LedgerConfig(max_peers=25, max_told_bans=50, max_senders=10))
    refused = accuse_own_keys(ledger, 600, every_s, senders)
    assert refused >= 550
    assert all(ledger.account(f"honest{n}").passed == 10 for n in range(20))
    assert ledger.is_banned("liar")
    assert len(ledger.peers()) <= 25 + 50 + 10


def test_nothing_that_strangers_prove_takes_the_place_of_an_observation() -> None:
    """Even where every allowance is gone round, as by proofs that another process has checked."""
    ledger = ledger_of_honest(LedgerConfig(max_peers=20, max_told_bans=5, max_senders=5))
    for number in range(500):
        ledger.add_proof(f"p{number}", f"own{number}", NOW, verified=True, sender=f"sender{number}")
    assert sum(peer_id.startswith("honest") for peer_id in ledger.peers()) == 20
    assert ledger.is_banned("liar")
    assert (
        sum(ledger.is_banned(f"own{n}") for n in range(500)) == 4
    )  # beside the liar, there was room for these


def test_a_ban_on_others_word_may_go_when_it_is_a_month_old() -> None:
    ledger = Ledger(LedgerConfig(max_told_bans=1))
    ledger.add_proof("p1", "first", NOW, verified=True, sender="a")
    assert ledger.weigh_proof("p2", "second", "b", NOW + WEEK_S) is ProofDecision.TOO_MANY
    assert ledger.weigh_proof("p2", "second", "b", NOW + 5 * WEEK_S) is ProofDecision.FETCH
    ledger.add_proof("p2", "second", NOW + 5 * WEEK_S, verified=True, sender="b")
    assert list(filter(ledger.is_banned, ledger.peers())) == ["second"]


def test_who_was_met_is_banned_on_a_proof_however_many_strangers_are() -> None:
    ledger = Ledger(LedgerConfig(max_told_bans=1))
    ledger.record_success("met", NOW)
    ledger.add_proof("p1", "stranger", NOW, verified=True, sender="a")
    assert ledger.weigh_proof("p2", "met", "b", NOW) is ProofDecision.FETCH
    ledger.add_proof("p2", "met", NOW, verified=True, sender="b")
    assert ledger.is_banned("met") and ledger.is_banned("stranger")


def test_what_loses_its_place_is_gone_from_the_file_and_what_keeps_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    config = LedgerConfig(max_peers=3, max_told_bans=2, max_senders=2)
    ledger = Ledger.open(path, config)
    for number in range(3):
        ledger.record_success(f"met{number}", NOW)
    for number in range(9):
        ledger.add_proof(f"p{number}", f"own{number}", NOW + number, verified=True, sender=f"s{number}")
    ledger.record_success("met3", NOW + 9)
    ledger.close()
    again = Ledger.open(path, LedgerConfig())
    assert sorted(again.peers()) == ["met1", "met2", "met3", "own0", "own1", "s7", "s8"]
    again.close()


def test_who_another_process_met_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    small, other = Ledger.open(path, LedgerConfig(max_peers=1)), Ledger.open(path)
    small.record_success("a", NOW)
    small.flush()
    other.flush()
    small.record_success("b", NOW + 1)  # there is no room for both
    other.record_success("a", NOW + 2)
    other.flush()
    small.flush()
    other.close()
    again = Ledger.open(path)
    assert again.account("a").sessions == 2
    again.close()
    small.close()


@pytest.mark.parametrize(
    ("account", "rank"),
    [
        (Account(), Rank.SENDER),
        (Account(proofs_false=1), Rank.SENDER),
        (Account(ban=Ban(1.0, "proof", "it lied")), Rank.TOLD),
        (Account(ban=Ban(1.0, "proof", "it lied"), sessions=1), Rank.KEPT),
        (Account(ban=Ban(1.0, "user", "rude")), Rank.KEPT),
        (Account(vouched=True), Rank.KEPT),
        (Account(suspected=1), Rank.MET),
        (Account(inconclusive=1), Rank.MET),
        (Account(forgiven_at=1.0), Rank.MET),
    ],
)
def test_what_was_observed_here_or_said_by_the_user_ranks_above_what_was_told(
    account: Account, rank: Rank
) -> None:
    assert rank_of(account) is rank


# ---------------------------------------------------------------------- clocks


def test_a_clock_that_was_ahead_leaves_nothing_recent_when_it_is_right_again() -> None:
    ledger = Ledger()
    ledger.record_failure("peer", NOW + YEAR_S, "vanished")
    ledger.ban("bad", now=NOW + YEAR_S)
    ledger.note_ranges("bad", ["192.0.2.0/24"], NOW + YEAR_S)
    low = ledger.score("peer").reliability
    ledger.advance(NOW)
    assert ledger.account("peer").latest == ledger.account("bad").latest == NOW
    assert ledger.spoilt_ranges(NOW) == {"192.0.2.0/24"}
    assert ledger.spoilt_ranges(NOW + WEEK_S + 1) == frozenset()
    ledger.advance(NOW + 12 * WEEK_S)
    assert ledger.score("peer").reliability > low + 0.03
    assert ledger.is_banned("bad")


def test_a_ledger_in_a_file_that_saw_a_clock_ahead_is_right_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger.open(path)
    ledger.record_failure("old", NOW - HOUR_S)
    ledger.record_failure("peer", NOW + YEAR_S)
    ledger.ban("bad", now=NOW + YEAR_S)
    ledger.close()
    ledger = Ledger.open(path)
    ledger.advance(NOW)
    assert ledger.account("old").as_of == NOW - HOUR_S
    assert ledger.account("peer").as_of == NOW
    ledger.close()
    again = Ledger.open(path)
    ban = again.account("bad").ban
    assert (again.account("peer").as_of, ban and ban.at) == (NOW, NOW)
    again.close()


def test_what_happens_to_a_peer_after_a_clock_was_ahead_counts_at_once() -> None:
    ledger = Ledger()
    ledger.record_failure("peer", NOW + YEAR_S)
    ledger.record_failure("other", NOW + YEAR_S)
    ledger.record_success("peer", NOW)
    assert ledger.account("peer").as_of == NOW and ledger.account("other").as_of == NOW + YEAR_S


def test_a_clock_that_is_a_little_behind_changes_nothing() -> None:
    ledger = Ledger()
    ledger.record_failure("peer", NOW)
    ledger.record_success("peer", NOW - 60.0)
    assert ledger.account("peer").as_of == NOW


# ---------------------------------------------------------------------- spoilt ranges


def test_a_route_looks_at_no_account_for_the_spoilt_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hundred thousand peers it took 147 ms of the event loop, for every route."""
    ledger = Ledger(LedgerConfig(max_peers=3000))
    for number in range(2000):
        ledger.record_success(f"p{number}", NOW)
    ledger.ban("bad", now=NOW)
    ledger.note_ranges("bad", ["192.0.2.0/24"], NOW)
    looked_at: list[str] = []

    def look(_: Account, name: str) -> None:
        looked_at.append(name)

    monkeypatch.setattr(Account, "__getattribute__", look)
    for number in range(100):
        assert ledger.spoilt_ranges(NOW + number) == {"192.0.2.0/24"}
    assert looked_at == []


def test_the_ranges_are_reckoned_anew_only_when_one_comes_or_goes() -> None:
    ledger = Ledger()
    for number in range(5):
        ledger.ban(f"bad{number}", now=NOW + number * HOUR_S)
        ledger.note_ranges(f"bad{number}", [f"203.0.{number}.0/24"], NOW + number * HOUR_S)
    first = ledger.spoilt_ranges(NOW + 5 * HOUR_S)
    assert ledger.spoilt_ranges(NOW + 6 * HOUR_S) is first
    assert len(ledger.spoilt_ranges(NOW + WEEK_S + 1)) == 4
    ledger.forgive("bad4", NOW + WEEK_S + 2)
    assert len(ledger.spoilt_ranges(NOW + WEEK_S + 3)) == 3


def test_two_of_one_allocation_spoil_all_of_it() -> None:
    """Whoever has an IPv6 /32 has 65,536 ranges of a customer's size."""
    ledger = Ledger()
    ranges = [[f"2001:db8:{n}::/48", "2001:db8::/32"] for n in range(2)]
    ledger.ban("a", now=NOW)
    ledger.note_ranges("a", ranges[0], NOW)
    assert ledger.spoilt_ranges(NOW) == {"2001:db8:0::/48"}
    ledger.ban("b", now=NOW)
    ledger.note_ranges("b", ranges[1], NOW)
    assert "2001:db8::/32" in ledger.spoilt_ranges(NOW)


def test_of_more_than_are_remembered_the_latest_found_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pinfer.reputation.spoilt_ranges.MAX_PEERS", 2)
    roster = Roster(LedgerConfig())
    for number in range(3):
        ban = Ban(NOW, "audits", "it lied")
        roster.put(f"p{number}", Account(ban=ban, failed=1, ranges=(f"203.0.{number}.0/24",)))
    assert roster.spoilt.since(0.0) == {"203.0.1.0/24", "203.0.2.0/24"}
