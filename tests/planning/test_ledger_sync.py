"""The file follows the ledger, and a failure to write is told once."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import trio

from p2pinfer.errors import LocalError
from p2pinfer.planning import ledger_sync
from p2pinfer.planning.ledger_sync import kept_ledger
from p2pinfer.reputation import store
from p2pinfer.reputation.ledger import Ledger


async def test_what_is_learnt_is_written_while_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_sync, "FLUSH_INTERVAL_S", 0.001)
    async with kept_ledger(tmp_path) as ledger:
        ledger.ban("bad")
        other = Ledger.open(tmp_path / "ledger.sqlite")
        with trio.fail_after(60):
            while not other.is_banned("bad"):
                await trio.sleep(0)
                other.flush()
        other.close()
        assert not ledger.is_dirty


async def test_a_file_that_cannot_be_written_is_told_once_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_sync, "FLUSH_INTERVAL_S", 0.001)
    tries = 0
    enough = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def fail(self: store.LedgerStore, changes: store.Changes) -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            token.run_sync_soon(enough.set)
        raise LocalError("no space left")

    async with kept_ledger(tmp_path) as ledger:
        monkeypatch.setattr(store.LedgerStore, "write", fail)
        ledger.ban("bad")
        with trio.fail_after(60):
            await enough.wait()
    assert caplog.messages == [
        "no space left; trying again",
        "no space left; the last observations of peers are lost",
    ]
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM peers").fetchone() == (0,)
    connection.close()


async def test_what_is_learnt_last_is_written_when_it_is_cancelled(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with kept_ledger(tmp_path) as ledger:
            ledger.ban("bad")
            scope.cancel()
            await trio.lowlevel.checkpoint()
    again = Ledger.open(tmp_path / "ledger.sqlite")
    assert again.is_banned("bad")
    again.close()
