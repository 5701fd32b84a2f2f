"""Records: merging counts nothing twice, and bytes from a file are held to bounds."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pinfer.reputation.account import (
    NEWCOMER,
    Account,
    after_audit,
    after_session,
    banned,
    forgiven,
    merged,
    not_after,
    vouched_for,
)
from p2pinfer.reputation.config import LedgerConfig

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
