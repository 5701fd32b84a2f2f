"""Plain words for every standing."""

from __future__ import annotations

import pytest

from p2pinfer.reputation.explain import moment, standing
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.verdict import Verdict

from .support import attestation, audit, verify


def told(ledger: Ledger, peer_id: str = "peer") -> str:
    return "\n".join(ledger.explain(peer_id))


def standing_of(ledger: Ledger, peer_id: str = "peer") -> str:
    return standing(ledger.account(peer_id), ledger.config)


def test_a_stranger() -> None:
    ledger = Ledger()
    assert "Nothing is known of it" in told(ledger)
    assert "audited in at least 100% of the sessions" in told(ledger)
    assert standing_of(ledger) == "newcomer"


def test_a_newcomer_is_told_how_far_it_is() -> None:
    ledger = Ledger()
    audit(ledger, "peer", Verdict.PASS, 3)
    assert "3 of the 8 audits after which it no longer is" in told(ledger)
    assert "Of 3 audits it passed 3: with 95% confidence at least 47% of its work is right" in told(ledger)


def test_one_in_good_standing_with_sessions_suspicions_and_praise() -> None:
    ledger = Ledger()
    for peer_id in ("peer", "b", "c"):
        audit(ledger, peer_id, Verdict.PASS, 20)
    audit(ledger, "peer", Verdict.SUSPECT)
    ledger.record_success("peer", 1.0)
    ledger.record_failure("peer", 1.0, "vanished")
    ledger.attest(attestation("author", {"peer": 0.95, "b": 0.95, "c": 0.95}), verify, 1.0)
    ledger.add_proof("p", "cheat", 1.0, verified=True, sender="peer")
    said = told(ledger)
    assert "It is in good standing." in said
    assert "(1 more were suspect, 0 inconclusive)" in said
    assert "Of its latest audits, 10% were suspect" in said
    assert "Of 2 sessions it saw 1 through" in said
    assert "Others whose audits agree with yours count as 19." in said
    assert "It sent 1 fraud proof that held and 0 that did not." in said
    assert said.endswith("vanished")
    assert standing_of(ledger) == "audited"


@pytest.mark.parametrize(
    ("how", "sentence", "word"),
    [
        ("user", "You banned it on 2", "banned by you"),
        ("audits", "because of its audits: int8", "banned by audits"),
        ("proof", "a fraud proof was checked and holds: address", "banned by proof"),
    ],
)
def test_the_banned(how: str, sentence: str, word: str) -> None:
    ledger, now = Ledger(), 1.7e9
    match how:
        case "user":
            ledger.ban("peer", "rude", now)
        case "audits":
            ledger.record_audit("peer", Verdict.FAIL, now, why="int8")
        case _:
            ledger.add_proof("address", "peer", now, verified=True)
    assert sentence in told(ledger)
    assert standing_of(ledger) == word
    assert "audited in" not in told(ledger)


def test_who_is_vouched_for_and_who_failed_and_stayed() -> None:
    ledger = Ledger(vouched=["mine"])
    assert "You vouched for it" in told(ledger, "mine")
    assert standing_of(ledger, "mine") == "vouched for"
    audit(ledger, "peer", Verdict.PASS, 100)
    audit(ledger, "peer", Verdict.FAIL)
    assert "has passed too many to be banned" in told(ledger)
    assert standing_of(ledger) == "failed audits"


def test_no_time_is_a_dash() -> None:
    assert moment(0.0) == "-"
