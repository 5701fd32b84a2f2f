"""The file: shared by processes, whole after a kill, and replaced when it is damaged."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from p2pinfer.errors import LocalError
from p2pinfer.reputation import store
from p2pinfer.reputation.ledger import Ledger, LedgerConfig
from p2pinfer.reputation.verdict import Verdict

from .support import attestation, audit, verify

WRITER = """
import sys
from pathlib import Path
from p2pinfer.reputation.ledger import Ledger

ledger = Ledger.open(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    ledger.record_success("shared", 1.0)
    ledger.record_success(f"{sys.argv[3]}-{number % 50}", 1.0)
    ledger.flush()
    print(number + 1, flush=True)
ledger.close()
"""


def start_writer(path: Path, events: int, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(events), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ledger.sqlite"


def test_everything_is_there_after_a_restart(path: Path) -> None:
    ledger = Ledger.open(path)
    audit(ledger, "a", Verdict.PASS, 20)
    audit(ledger, "b", Verdict.PASS, 20)
    audit(ledger, "c", Verdict.PASS, 20)
    audit(ledger, "cheat", Verdict.FAIL)
    ledger.record_failure("a", 2.0, "vanished")
    ledger.vouch("mine", 3.0)
    ledger.attest(attestation("author", {"a": 0.95, "b": 0.95, "c": 0.95}), verify, 3.0)
    ledger.add_proof("address", "worse", 3.0, verified=True, sender="witness")
    peers = ("a", "b", "c", "cheat", "mine", "worse", "witness", "stranger")
    before = [(ledger.score(each), ledger.account(each)) for each in peers]
    proofs, said = ledger.proofs(), ledger.attested("a")
    ledger.close()
    again = Ledger.open(path)
    again.advance(3.0)
    assert [(again.score(each), again.account(each)) for each in peers] == before
    assert (again.proofs(), again.attested("a")) == (proofs, said)
    assert sum(said) > 0 and again.is_banned("worse")
    again.close()


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    writers = [start_writer(path, 60, name) for name in "abc"]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    ledger = Ledger.open(path)
    assert ledger.account("shared").sessions == 180
    assert sum(ledger.account(f"{name}-{n}").sessions for name in "abc" for n in range(50)) == 180
    ledger.close()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_writer_killed_at_any_moment_damages_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it said was written is there, at whatever instruction it died."""
    acknowledged = 0
    for events in (1, 7, 20):
        writer = start_writer(path, 100_000, "w")
        assert writer.stdout is not None
        for _ in range(events):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        said = writer.stdout.read().split()
        writer.wait(timeout=90)
        writer.stdout.close()
        acknowledged += int(said[-1]) if said else events
        ledger = Ledger.open(path)
        assert acknowledged <= ledger.account("shared").sessions <= acknowledged + 1
        acknowledged = ledger.account("shared").sessions
        ledger.close()
    assert not caplog.messages


@pytest.mark.parametrize("damage", ["not a database", "torn"])
def test_a_damaged_file_is_moved_aside_and_a_fresh_one_begun(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger.open(path)
    for number in range(200):
        ledger.record_failure(f"peer{number}", 1.0, "vanished")
    ledger.close()
    whole = path.read_bytes()
    if damage == "torn":
        path.write_bytes(whole[:5000] + os.urandom(4000) + whole[9000:])
    else:
        path.write_bytes(b"Dear diary, " * 1000)
    path.with_name(f"{path.name}-wal").write_bytes(b"of no use")
    with caplog.at_level(logging.WARNING):
        ledger = Ledger.open(path)
    (message,) = caplog.messages
    assert "is damaged" in message and f"{path}.damaged-1" in message
    assert ledger.peers() == {}
    ledger.record_success("a", 1.0)
    ledger.close()
    assert path.with_name("ledger.sqlite.damaged-1").read_bytes() != whole
    path.write_bytes(b"again")
    Ledger.open(path).close()
    assert path.with_name("ledger.sqlite.damaged-2").read_bytes() == b"again"


def test_a_file_without_its_tables_is_damaged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Ledger.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE proofs")
    connection.close()
    Ledger.open(path).close()
    assert "its tables are missing" in caplog.text


def test_a_record_that_cannot_be_read_is_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger.open(path)
    ledger.record_success("good", 1.0)
    ledger.record_success("odd", 1.0)
    ledger.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE peers SET record = '{\"alpha\": -1}' WHERE peer_id = 'odd'")
    connection.close()
    ledger = Ledger.open(path)
    assert list(ledger.peers()) == ["good"]
    assert "ignoring the ledger's record of 'odd'" in caplog.text
    ledger.close()


def test_a_later_versions_file_is_left_alone(path: Path) -> None:
    Ledger.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(LocalError, match="a later version of p2pinfer wrote the ledger"):
        Ledger.open(path)
    assert path.exists()


def test_an_earlier_versions_file_is_read_and_closed_to_that_version(path: Path) -> None:
    ledger = Ledger.open(path)
    ledger.ban("bad", now=1.0)
    ledger.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    ledger = Ledger.open(path)
    assert ledger.is_banned("bad")
    ledger.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()


def test_bounds_hold_in_the_file_too(path: Path) -> None:
    ledger = Ledger.open(path, LedgerConfig(max_peers=3, max_proofs=2, max_attesters=2))
    ledger.ban("bad", now=1.0)
    for number in range(6):
        ledger.record_success(f"p{number}", 2.0 + number)
        ledger.add_proof(f"proof{number}", "bad", 2.0 + number, verified=False)
        ledger.attest(attestation(f"author{number}", {}, made_at=2.0 + number), verify, 9.0)
    ledger.close()
    with sqlite3.connect(path) as connection:
        assert {row[0] for row in connection.execute("SELECT peer_id FROM peers")} == {"bad", "p4", "p5"}
        assert {row[0] for row in connection.execute("SELECT address FROM proofs")} == {"proof4", "proof5"}
        assert connection.execute("SELECT count(*) FROM attestations").fetchone() == (2,)
    connection.close()


def test_an_older_attestation_and_an_unchecked_proof_overwrite_nothing(path: Path) -> None:
    first, second = Ledger.open(path), Ledger.open(path)
    first.attest(attestation("author", {"new": 1.0}, made_at=5.0), verify, 5.0)
    first.add_proof("address", "cheat", 5.0, verified=True)
    first.flush()
    second.attest(attestation("author", {"old": 1.0}, made_at=4.0), verify, 5.0)
    second.weigh_proof("address", "somebody", "sender", 6.0)
    second.close()
    first.close()
    again = Ledger.open(path)
    assert again.proofs()["address"].state == "verified"
    with sqlite3.connect(path) as connection:
        (record,) = connection.execute("SELECT record FROM attestations").fetchone()
    connection.close()
    assert "new" in record
    again.close()


def test_a_ledger_that_another_process_is_making_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.01)
    path.parent.mkdir()
    with FileLock(f"{path}.lock"), pytest.raises(LocalError, match="another process has locked the ledger"):
        Ledger.open(path)
