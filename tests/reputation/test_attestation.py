"""What others say moves a ranking within caps, and never bans."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.errors import ProtocolViolation
from p2pinfer.reputation.attestation import (
    MAX_ATTESTATION_BYTES,
    MAX_OPINIONS,
    Attestation,
    Opinion,
    open_attestation,
    seal_attestation,
)
from p2pinfer.reputation.ledger import Ledger, LedgerConfig
from p2pinfer.reputation.verdict import Verdict

from .support import attestation, audit, signer, verify

GOOD = {"a": 0.95, "b": 0.95, "c": 0.95}


def knowing(*peers: str, passes: int = 20) -> Ledger:
    """A ledger that audited these peers."""
    ledger = Ledger()
    for peer_id in peers:
        audit(ledger, peer_id, Verdict.PASS, passes)
    return ledger


def test_an_author_has_no_weight_before_three_peers_overlap() -> None:
    ledger = knowing("a", "b", "new", passes=20)
    assert ledger.attest(attestation("author", {**GOOD, "d": 0.95}), verify, 1.0) == 0.0
    assert ledger.attested("a") == (0.0, 0.0)
    audit(ledger, "c", Verdict.PASS, 20)
    assert ledger.attester_weight("author") > 0.95
    assert sum(ledger.attested("a")) > 0


def test_who_disagrees_with_what_we_saw_is_not_heard() -> None:
    ledger = knowing("a", "b", passes=20)
    audit(ledger, "cheat", Verdict.FAIL)
    liar = {"a": 0.1, "b": 0.1, "cheat": 1.0}
    assert ledger.attest(attestation("liar", liar), verify, 1.0) == 0.0
    half = {"a": 0.95, "b": 0.95, "cheat": 0.5}
    assert 0.5 < ledger.attest(attestation("half", half), verify, 1.0) < 0.9


def test_hearsay_counts_no_more_than_own_evidence_and_the_cap() -> None:
    ledger = knowing("a", "b", "c", passes=5)
    audit(ledger, "d", Verdict.PASS, 60)
    for number in range(50):
        said = {**GOOD, "d": 1.0, "never-audited": 1.0}
        ledger.attest(attestation(f"author{number}", said, audits=1e6), verify, 1.0)
    assert sum(ledger.attested("a")) == pytest.approx(ledger.account("a").evidence)
    assert sum(ledger.attested("d")) == pytest.approx(20.0)
    assert ledger.score("never-audited") == ledger.score("stranger")
    alone = knowing("a", passes=5)
    doubled = knowing("a", passes=10)
    assert alone.score("a").integrity < ledger.score("a").integrity <= doubled.score("a").integrity + 0.01


def test_hearsay_lowers_a_score_but_never_bans_nor_changes_the_audit_rate() -> None:
    ledger = knowing("a", "b", "c", "d", "e", "target", passes=20)
    before, rate = ledger.score("target").integrity, ledger.audit_probability("target", 1.0)
    for number in range(99):
        said = {**GOOD, "d": 0.95, "e": 0.95, "target": 0.0}
        ledger.attest(attestation(f"author{number}", said), verify, 1.0)
    assert ledger.score("target").integrity < before - 0.2
    assert not ledger.is_banned("target")
    assert ledger.audit_probability("target", 1.0) == rate


def test_nobody_is_heard_about_itself_nor_when_banned() -> None:
    ledger = knowing("a", "b", "c", "author", passes=20)
    ledger.attest(attestation("author", {**GOOD, "author": 1.0}), verify, 1.0)
    assert ledger.attested("author") == (0.0, 0.0)
    assert sum(ledger.attested("a")) > 0
    ledger.ban("author")
    assert ledger.attester_weight("author") == 0.0
    assert ledger.attested("a") == (0.0, 0.0)


def test_the_latest_attestation_of_an_author_counts_and_the_old_expire() -> None:
    ledger = knowing("a", "b", "c", passes=20)
    ledger.attest(attestation("author", GOOD, made_at=10.0), verify, 10.0)
    assert ledger.attest(attestation("author", dict.fromkeys(GOOD, 0.0), made_at=9.0), verify, 10.0) > 0.9
    ledger.attest(attestation("other", GOOD, made_at=8 * 86400.0), verify, 8 * 86400.0)
    assert ledger.attester_weight("author") == 0.0
    assert ledger.attester_weight("other") > 0.9


def test_attesters_without_weight_make_room_first() -> None:
    ledger = Ledger(LedgerConfig(max_attesters=2))
    for peer_id in GOOD:
        audit(ledger, peer_id, Verdict.PASS, 20)
    for author, said in (("useful", GOOD), ("noise", {"x": 1.0}), ("more noise", {"y": 1.0})):
        ledger.attest(attestation(author.replace(" ", "-"), said), verify, 1.0)
    assert ledger.attester_weight("useful") > 0.9


def test_what_one_ledger_says_another_understands() -> None:
    ledger = knowing("a", "b", "c", passes=20)
    audit(ledger, "cheat", Verdict.FAIL)
    ledger.record_success("only met", 1.0)
    own = ledger.own_opinions("me", 2.0)
    assert {opinion.peer_id for opinion in own.opinions} == {"a", "b", "c", "cheat"}
    other = knowing("a", "b", "c", passes=15)
    assert other.attest(seal_attestation(own, signer("me")), verify, 2.0) > 0.9


def test_opinions_are_so_many_at_most_the_best_known_first() -> None:
    ledger = Ledger()
    for number in range(MAX_OPINIONS + 10):
        audit(ledger, f"p{number}", Verdict.PASS, 2 if number >= 10 else 1)
    own = ledger.own_opinions("me", 1.0)
    assert len(own.opinions) == MAX_OPINIONS
    assert {"p0", "p9"}.isdisjoint(opinion.peer_id for opinion in own.opinions)
    assert open_attestation(seal_attestation(own, signer("me")), verify, 1.0) == own


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (b"", "malformed"),
        (b"\x92\xc4\x00\xc4\x00", "malformed"),
        (b"\x91" * 5000, "malformed"),
        (b"\xc4" + bytes(MAX_ATTESTATION_BYTES), "are allowed"),
        (attestation("author", {"a": 1.5}), "malformed"),
        (attestation("author", {"a": float("nan")}), "malformed"),
        (attestation("author", {"a": 0.5}, audits=-1.0), "malformed"),
        (attestation("two words", {"a": 0.5}), "malformed"),
        (attestation("author", {"a": 0.5}, made_at=1e6), "future"),
        (seal_attestation(Attestation(2, "author", 1.0, ()), signer("author")), "malformed"),
        (seal_attestation(Attestation(1, "author", 1.0, ()), signer("thief")), "not its author's"),
        (
            seal_attestation(
                Attestation(1, "a", 1.0, tuple(Opinion(f"{n}", 1.0, 1.0) for n in range(257))), signer("a")
            ),
            "malformed",
        ),
    ],
)
def test_what_is_no_attestation_is_refused(record: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolViolation, match=complaint):
        open_attestation(record, verify, 1.0)


@given(st.binary(max_size=300))
def test_random_bytes_are_a_protocol_violation(record: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        open_attestation(record, verify, 1.0)


@given(st.data())
def test_a_changed_bit_is_a_protocol_violation(data: st.DataObject) -> None:
    record = bytearray(attestation("author", GOOD))
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolViolation):
        open_attestation(bytes(record), verify, 1.0)


means = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1), max_size=8)


@given(st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), means, st.floats(0, 1e6)), max_size=6))
def test_whatever_is_attested_scores_stay_within_the_caps(
    said: list[tuple[str, dict[str, float], float]],
) -> None:
    ledger = knowing("a", "b", "c", passes=4)
    audit(ledger, "d", Verdict.FAIL)
    banned = {peer_id: ledger.is_banned(peer_id) for peer_id in "abcdefgh"}
    for made_at, (author, opinions, audits) in enumerate(said):
        ledger.attest(attestation(author, opinions, audits, float(made_at)), verify, 10.0)
    for peer_id in "abcdefgh":
        good, bad = ledger.attested(peer_id)
        assert good >= 0 and bad >= 0
        assert good + bad <= min(20.0, ledger.account(peer_id).evidence) + 1e-9
        assert 0 <= ledger.score(peer_id).integrity <= 1
        assert ledger.is_banned(peer_id) == banned[peer_id]
