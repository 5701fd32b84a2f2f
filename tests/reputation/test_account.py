"""Records: merging counts nothing twice, and bytes from a file are held to bounds."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.reputation.account import (
    NEWCOMER,
    Account,
    AuditResult,
    after_audit,
    after_session,
    after_withholding,
    banned,
    forgiven,
    merged,
    not_after,
    vouched_for,
)
from p2pinfer.reputation.config import LedgerConfig
from p2pinfer.reputation.explain import explain, standing
from p2pinfer.reputation.score import audit_probability, score_of

CONFIG = LedgerConfig()
events = st.sampled_from(["ok", "lost", "pass", "fail", "suspect", "inconclusive", "ban", "forgive", "vouch"])
histories = st.lists(st.tuples(events, st.floats(0, 1e9)), max_size=30)


def after(history: list[tuple[str, float]]) -> Account:
    account = NEWCOMER
    for event, now in history:
        match event:
            case "ok" | "lost":
                account = after_session(account, event == "ok", now, "why", CONFIG)
            case "pass" | "fail" | "suspect" | "inconclusive":
                account = after_audit(account, event, now, "", CONFIG)
            case "ban":
                account = banned(account, now, "user", "rude")
            case "forgive":
                account = forgiven(account, now)
            case _:
                account = vouched_for(account, now)
    return account


@given(histories)
def test_a_record_survives_the_file(history: list[tuple[str, float]]) -> None:
    account = after(history)
    assert msgspec.json.decode(msgspec.json.encode(account), type=Account) == account


@given(histories, histories)
def test_merging_twice_is_merging_once(
    ours: list[tuple[str, float]], theirs: list[tuple[str, float]]
) -> None:
    once = merged(after(ours), after(theirs))
    assert merged(once, after(theirs)) == once
    assert merged(once, once) == once
    assert once.audits == max(after(ours).audits, after(theirs).audits)
    assert once.sessions == max(after(ours).sessions, after(theirs).sessions)
    msgspec.json.decode(msgspec.json.encode(once), type=Account)


def test_of_a_ban_and_a_pardon_the_later_counts() -> None:
    ban, pardon = banned(NEWCOMER, 5.0, "user", "rude"), forgiven(NEWCOMER, 6.0)
    assert merged(ban, pardon).ban is None
    assert merged(pardon, banned(NEWCOMER, 7.0, "proof", "caught")).ban is not None
    assert merged(vouched_for(NEWCOMER, 1.0), banned(NEWCOMER, 2.0, "user", "rude")).vouched is False


@given(histories)
def test_no_time_of_a_record_is_in_the_future(history: list[tuple[str, float]]) -> None:
    account = not_after(after(history), 100.0)
    assert max(account.as_of, account.last_seen, account.first_seen, account.forgiven_at) <= 100.0
    assert all(note.at <= 100.0 for note in account.notes)
    assert account.ban is None or account.ban.at <= 100.0


@pytest.mark.parametrize(
    "written",
    [
        b'{"alpha": 0.5}',
        b'{"alpha": 1e300}',
        b'{"good": -1}',
        b'{"as_of": 1e400}',
        b'{"suspicion": 1.5}',
        b'{"sessions": 1.5}',
        b'{"ban": {"at": 1, "by": "nobody", "why": ""}}',
        b'{"notes": [{"at": 1, "text": "' + b"x" * 241 + b'"}]}',
        b'{"notes": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"stranger": 1}',
        b"[]",
        b'{"alpha": NaN}',
    ],
)
def test_a_record_out_of_bounds_is_none(written: bytes) -> None:
    with pytest.raises((msgspec.MsgspecError, RecursionError)):
        msgspec.json.decode(written, type=Account)


def test_a_failure_weighs_no_more_than_a_record_can_hold() -> None:
    account = Account(beta=1e6)
    assert after_audit(account, "fail", 1.0, "", CONFIG).beta == 1e6


def evading(pattern: str) -> Account:
    """An account after audits: `p` passed, `w` had no result for a reason that lay with the peer."""
    account = NEWCOMER
    for result in pattern:
        if result == "w":
            account = after_withholding(account, 1.0, "", CONFIG)
        else:
            account = after_audit(account, "pass", 1.0, "", CONFIG)
    return account


def test_audits_that_are_evaded_cost_reliability_at_once_and_integrity_when_it_repeats() -> None:
    once = evading("w")
    assert (once.alpha, once.beta) == (1, 1)
    assert once.reliability(1.0, CONFIG)[0] < NEWCOMER.reliability(1.0, CONFIG)[0]
    assert once.is_newcomer(CONFIG)
    betas = [evading("w" * count).beta for count in range(1, 7)]
    assert betas == sorted(set(betas))
    assert not evading("wwww").is_newcomer(CONFIG)  # nobody tries it any more for being new
    ever = evading("w" * 60)
    assert ever.integrity_mean < 0.03
    assert ever.ban is None  # it is no proof
    assert audit_probability(ever, CONFIG) == 1.0


def contradicted(pattern: str) -> Account:
    """An account after audits of a client without the blocks: `p` passed, `c` three others contradicted."""
    account = NEWCOMER
    for result in pattern:
        verdict: AuditResult = "pass" if result == "p" else "suspect"
        account = after_audit(account, verdict, 1.0, "", CONFIG, contradicted=result == "c")
    return account


def test_whom_three_others_contradict_again_and_again_is_used_no_more_and_never_banned() -> None:
    once = contradicted("p" * 8 + "c")
    assert once.beta == 1 + CONFIG.contradiction_weight
    assert not once.is_newcomer(CONFIG)  # nobody tries it any more for being new
    ever = contradicted("c" * 60)
    assert ever.integrity_mean < 0.03
    assert ever.ban is None
    # Three colluders among those asked, in one of fifteen audits, leave an honest peer among the better ones.
    assert contradicted(("p" * 14 + "c") * 4).integrity_mean > 0.75
    assert contradicted("ppppc" * 4).integrity_mean < 0.55  # a liar in a fifth of its sessions
    # What was published as a proof besides costs as much as a confirmed FAIL, and bans nobody either.
    accused = after_audit(NEWCOMER, "suspect", 1.0, "", CONFIG, contradicted=True, accused=True)
    assert accused.beta == 1 + CONFIG.fail_weight
    assert accused.ban is None
    # Where the blocks are at hand a suspicion is nothing of the kind.
    suspect = NEWCOMER
    for _ in range(10):
        suspect = after_audit(suspect, "suspect", 1.0, "", CONFIG)
    assert suspect.beta == 1


@pytest.mark.parametrize(
    ("pattern", "least"), [("pppppppppw" * 6, 0.9), ("pppppw" * 10, 0.9), ("p" * 30 + "www", 0.9)]
)
def test_evidence_lost_now_and_then_costs_no_integrity_to_speak_of(pattern: str, least: float) -> None:
    """A restart, a busy hour, a line that was down: what passes in between outweighs it."""
    account = evading(pattern)
    assert account.integrity_mean > least
    assert account.ban is None


def test_who_evades_half_of_its_audits_is_less_believed_than_who_passes_them() -> None:
    assert evading("pw" * 30).integrity_mean < 0.75 < evading("p" * 30).integrity_mean


@pytest.mark.parametrize("pattern", ["c", "ppppc" * 4, "pc", "pppppppp" + "ppppc" * 10])
def test_who_was_outvoted_too_often_is_avoided_and_told_of(pattern: str) -> None:
    account = contradicted(pattern)
    score = score_of(account, (0.0, 0.0), 1.0, CONFIG)
    assert score.is_shunned and not score.is_newcomer
    assert standing(account, CONFIG) == "avoided"
    assert "used only where nobody else is" in explain(account, score, (0.0, 0.0), CONFIG)[0]


@pytest.mark.parametrize("pattern", ["", "p", "p" * 8, "p" * 12 + "c", "p" * 40 + "cc", "c" + "p" * 12])
def test_one_vote_against_an_honest_peer_does_not_shut_it_out_for_long(pattern: str) -> None:
    score = score_of(contradicted(pattern), (0.0, 0.0), 1.0, CONFIG)
    assert not score.is_shunned
    # And whoever is avoided after a single one is tried again where routes are tried.
    first = score_of(contradicted("c"), (0.0, 0.0), 1.0, CONFIG)
    assert first.at_best is not None and not first.at_best.is_shunned


@pytest.mark.parametrize("pattern", ["w", "ww", "pppppw" * 10, "p" * 30 + "www"])
def test_who_lost_evidence_now_and_then_is_not_avoided(pattern: str) -> None:
    assert not score_of(evading(pattern), (0.0, 0.0), 1.0, CONFIG).is_shunned
