"""Records in memory and in the file: who is forgotten, and what comes of several writers."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pinfer.errors import LocalError
from p2pinfer.reputation import store
from p2pinfer.reputation.account import Account
from p2pinfer.reputation.ledger import Ledger, LedgerConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ledger.sqlite"


def test_the_longest_unseen_peer_is_forgotten_first() -> None:
    ledger = Ledger(LedgerConfig(max_peers=2))
    for peer_id in ("a", "b", "a", "c"):
        ledger.record_failure(peer_id, 0.0)
    prior = ledger.score("stranger")
    assert ledger.score("b") == prior
    assert ledger.score("a") != prior and ledger.score("c") != prior


def test_the_banned_are_forgotten_last() -> None:
    ledger = Ledger(LedgerConfig(max_peers=2), banned=["bad"])
    for peer_id in ("a", "b", "c"):
        ledger.record_success(peer_id, 0.0)
    assert list(ledger.peers()) == ["bad", "c"]
    for peer_id in ("worse", "worst"):
        ledger.ban(peer_id)
    assert list(ledger.peers()) == ["worse", "worst"]


def test_a_ledger_in_memory_writes_nothing() -> None:
    ledger = Ledger()
    ledger.record_success("a", 1.0)
    assert not ledger.is_dirty
    ledger.flush()
    ledger.close()
    ledger.close()


def test_two_open_ledgers_add_up_and_see_each_other(path: Path) -> None:
    first, second = Ledger.open(path), Ledger.open(path)
    for _ in range(3):
        first.record_success("peer", 1.0)
        second.record_success("peer", 1.0)
    assert first.is_dirty
    first.flush()
    assert not first.is_dirty
    second.flush()
    second.record_success("peer", 2.0)  # not written yet when the other's news come in
    first.ban("bad")
    first.flush()
    assert first.account("peer").sessions == 6
    assert not second.is_banned("bad")
    second.flush()
    assert second.is_banned("bad") and second.account("peer").sessions == 7
    first.close()
    second.close()


def test_what_comes_while_others_news_are_read_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, other = Ledger.open(path), Ledger.open(path)
    other.record_success("peer", 1.0)
    other.record_success("stranger", 1.0)
    other.flush()
    ledger.record_success("peer", 1.0)
    write = store.LedgerStore.write

    def write_slowly(self: store.LedgerStore, changes: store.Changes) -> dict[str, Account]:
        written = write(self, changes)
        ledger.record_success("peer", 2.0)
        ledger.record_success("late", 2.0)
        return written

    monkeypatch.setattr(store.LedgerStore, "write", write_slowly)
    ledger.flush()
    monkeypatch.undo()
    assert ledger.account("peer").sessions == 3
    assert ledger.account("late").sessions == ledger.account("stranger").sessions == 1
    ledger.close()
    other.flush()
    assert other.account("peer").sessions == 3
    other.close()


@contextmanager
def once_banned_always_banned(ledger: Ledger, *peer_ids: str) -> Generator[None]:
    """Whoever looks in between any two calls, as another thread may, sees every ban there has been."""
    seen: dict[str, list[bool]] = {peer_id: [] for peer_id in peer_ids}

    def look(*_: object) -> None:
        for peer_id, bans in seen.items():
            bans.append(ledger.is_banned(peer_id))

    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert all(bans[-1] and bans == sorted(bans) for bans in seen.values())


def test_a_banned_peer_is_a_stranger_at_no_moment_of_an_event() -> None:
    ledger = Ledger(banned=["bad"])
    with once_banned_always_banned(ledger, "bad"):
        ledger.record_failure("bad", 1.0)


def test_a_banned_peer_is_a_stranger_at_no_moment_of_a_flush(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, other = Ledger.open(path), Ledger.open(path)
    ledger.ban("early")
    other.record_success("stranger", 1.0)
    other.flush()
    read = store.LedgerStore.read

    def read_slowly(self: store.LedgerStore) -> store.Contents | None:
        contents = read(self)
        ledger.ban("late")  # by another thread, say
        return contents

    monkeypatch.setattr(store.LedgerStore, "read", read_slowly)
    with once_banned_always_banned(ledger, "early", "late"):
        ledger.flush()
    monkeypatch.undo()
    ledger.close()
    other.close()


def test_what_could_not_be_written_is_kept_and_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.01)
    ledger = Ledger.open(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    ledger.record_success("a", 1.0)
    with pytest.raises(LocalError, match="database is locked"):
        ledger.flush()
    ledger.record_success("a", 2.0)
    other.close()
    ledger.flush()
    ledger.close()
    again = Ledger.open(path)
    assert again.account("a").sessions == 2
    again.close()
