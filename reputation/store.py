"""Ledger on disk: SQLite, shared by every process of this data directory.

Theory of operation. Nothing is overwritten that was not read in the same transaction: `write` takes changes
(functions from record to record), begins an immediate transaction, reads the rows concerned, applies the
changes and writes them back. So processes that write at the same time queue for milliseconds and no evidence
is lost. The journal is a WAL, synchronised at checkpoints: a process killed at any instruction loses what it
had not committed and damages nothing; a power cut may lose the last commits too.

A file that is no database, or fails SQLite's own check, is moved aside under a lock and a fresh one made; so
is nothing else. A row that does not decode is left out, and said so. Files of a later version are refused.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

import msgspec
from filelock import FileLock, Timeout

from p2pinfer.errors import LocalError
from p2pinfer.folders import create_private, make_private

from .account import NEWCOMER, Account
from .attestation import Attestation
from .config import LedgerConfig

logger = logging.getLogger(__name__)

FILE_NAME: Final = "ledger.sqlite"
FORMAT: Final = 2  # PRAGMA user_version; accounts of 1 lack fields and are read as they are
BUSY_TIMEOUT_S: Final = 10.0  # how long to wait for another process's transaction

_SCHEMA: Final = """
CREATE TABLE peers (peer_id TEXT PRIMARY KEY, seen REAL NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX peers_by_age ON peers (seen);
CREATE TABLE attestations (author TEXT PRIMARY KEY, made_at REAL NOT NULL, record TEXT NOT NULL)
    WITHOUT ROWID;
CREATE TABLE proofs (address TEXT PRIMARY KEY, at REAL NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
"""

Change: TypeAlias = Callable[[Account], Account]
ProofState: TypeAlias = Literal["seen", "verified", "false"]
_Row = TypeVar("_Row")


class ProofNote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fate of one fraud proof, kept so that each is checked once and who lies in them is known."""

    accused: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,128}\Z")]
    sender: Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{0,128}\Z")]  # empty: made here
    state: ProofState
    at: Annotated[float, msgspec.Meta(ge=0, le=1e11)]


@dataclass(slots=True)
class Changes:
    """Observations of one process that are not written yet."""

    accounts: list[tuple[str, Change]] = field(default_factory=list[tuple[str, Change]])
    attestations: dict[str, Attestation] = field(default_factory=dict[str, Attestation])
    proofs: dict[str, ProofNote] = field(default_factory=dict[str, ProofNote])
    forgotten: dict[str, float] = field(default_factory=dict[str, float])  # peers, last seen then or before

    def __bool__(self) -> bool:
        return bool(self.accounts or self.attestations or self.proofs or self.forgotten)


@dataclass(slots=True)
class Contents:
    """Content of the file."""

    accounts: dict[str, Account] = field(default_factory=dict[str, Account])
    attestations: dict[str, Attestation] = field(default_factory=dict[str, Attestation])
    proofs: dict[str, ProofNote] = field(default_factory=dict[str, ProofNote])


class LedgerStore:
    """An open ledger file. One thread at a time; made by `open_store`."""

    def __init__(self, path: Path, connection: sqlite3.Connection, config: LedgerConfig) -> None:
        self.path = path
        self._connection = connection
        self._config = config
        self._version = -1  # of the file as of the last read; SQLite's data_version

    def read(self) -> Contents | None:
        """Everything, in the order of the last event; None if nobody else wrote since the last read.

        Raises:
            LocalError: The file cannot be read any more.
        """
        with _told(self.path):
            version = self._data_version()
            if version == self._version:
                return None
            self._version = version
            rows = self._connection.execute
            return Contents(
                dict(_decoded(rows("SELECT peer_id, record FROM peers ORDER BY seen, peer_id"), Account)),
                dict(_decoded(rows("SELECT author, record FROM attestations ORDER BY made_at"), Attestation)),
                dict(_decoded(rows("SELECT address, record FROM proofs ORDER BY at, address"), ProofNote)),
            )

    def write(self, changes: Changes) -> dict[str, Account]:
        """Apply the changes in one transaction, and return the records they led to.

        Raises:
            LocalError: Nothing was written: no room, no permission, or another process holds the file.
        """
        with _told(self.path), self._transaction():
            records: dict[str, Account] = {}
            for peer_id, change in changes.accounts:
                if peer_id not in records:
                    records[peer_id] = self._account(peer_id)
                records[peer_id] = change(records[peer_id])
            run = self._connection.executemany
            run(
                "INSERT OR REPLACE INTO peers VALUES (?, ?, ?)",
                [(peer_id, record.latest, _encode(record)) for peer_id, record in records.items()],
            )
            # Another process may have met one since; then it stays.
            run("DELETE FROM peers WHERE peer_id = ? AND seen <= ?", list(changes.forgotten.items()))
            # A later attestation replaces an earlier one, whoever comes last.
            run(
                "INSERT INTO attestations VALUES (?, ?, ?) ON CONFLICT (author) DO UPDATE SET"
                " made_at = excluded.made_at, record = excluded.record WHERE excluded.made_at > made_at",
                [(author, said.made_at, _encode(said)) for author, said in changes.attestations.items()],
            )
            # What was checked stays checked.
            run(
                "INSERT INTO proofs VALUES (?, ?, ?) ON CONFLICT (address) DO UPDATE SET"
                " at = excluded.at, record = excluded.record"
                " WHERE json_extract(record, '$.state') = 'seen'",
                [(address, note.at, _encode(note)) for address, note in changes.proofs.items()],
            )
            self._make_room()
            return records

    def close(self) -> None:
        """Close the file. Harmless twice."""
        self._connection.close()

    def _account(self, peer_id: str) -> Account:
        row = self._connection.execute("SELECT peer_id, record FROM peers WHERE peer_id = ?", (peer_id,))
        return dict(_decoded(row, Account)).get(peer_id, NEWCOMER)

    def _make_room(self) -> None:
        """Keep the bounds of all but peers: of those the roster says who goes."""
        config, run = self._config, self._connection.execute
        for table, key, order, most in (
            ("attestations", "author", "made_at", config.max_attesters),
            ("proofs", "address", "at", config.max_proofs),
        ):
            surplus = run(f"SELECT count(*) FROM {table}").fetchone()[0] - most
            if surplus > 0:
                run(
                    f"DELETE FROM {table} WHERE {key} IN"
                    f" (SELECT {key} FROM {table} ORDER BY {order} LIMIT ?)",
                    (surplus,),
                )

    def _data_version(self) -> int:
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def _transaction(self) -> Generator[None]:
        # Immediate: a transaction that starts with reading cannot be upgraded once another one wrote.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.rollback()
            raise
        self._connection.execute("COMMIT")


def open_store(path: Path, config: LedgerConfig | None = None) -> LedgerStore:
    """Open the ledger in `path`, made on first use. What is damaged is moved aside, with a warning.

    Raises:
        LocalError: The file cannot be made, read or written, or a later version of p2pinfer made it.
    """
    try:
        make_private(path.parent)
        # Of two processes that find the file damaged or absent, one acts and the other finds it done.
        with FileLock(f"{path}.lock", timeout=BUSY_TIMEOUT_S, mode=0o600):
            try:
                connection = _connect(path)
            except sqlite3.DatabaseError as exc:
                if isinstance(exc, sqlite3.OperationalError):
                    raise
                aside = _move_aside(path)
                logger.warning(
                    "the ledger %s is damaged (%s): it was moved to %s, and an empty one was made",
                    path,
                    exc,
                    aside,
                )
                connection = _connect(path)
    except Timeout as exc:
        raise LocalError(
            f"another process has locked the ledger {path}; stop it or choose another --data-dir"
        ) from exc
    except (OSError, sqlite3.Error) as exc:
        said = getattr(exc, "strerror", None) or exc
        raise LocalError(
            f"cannot use the ledger {path}: {said}; choose another folder with --data-dir"
        ) from exc
    return LedgerStore(path, connection, config or LedgerConfig())


def _connect(path: Path) -> sqlite3.Connection:
    """A connection to a file of our format.

    Raises:
        sqlite3.DatabaseError: The file is damaged; its subclass OperationalError: it cannot be used now.
        LocalError: It is of a later version.
    """
    create_private(path)  # SQLite gives what lies beside it the same permissions
    connection = sqlite3.connect(path, BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > FORMAT:
            raise LocalError(f"a later version of p2pinfer wrote the ledger {path}; use that one")
        if version < FORMAT:
            made = _SCHEMA if version == 0 else ""
            connection.executescript(f"BEGIN; {made} PRAGMA user_version = {FORMAT}; COMMIT;")
        _check_tables(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_tables(connection: sqlite3.Connection) -> None:
    found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"peers", "attestations", "proofs"} <= found:
        raise sqlite3.DatabaseError("its tables are missing")


def _move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    for ending in ("-wal", "-shm"):  # they belong to the damaged file and would be played into the new one
        beside = path.with_name(path.name + ending)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + ending))
    return aside


@contextmanager
def _told(path: Path) -> Generator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise LocalError(f"cannot use the ledger {path}: {exc}") from exc


def _encode(record: Account | Attestation | ProofNote) -> str:
    return msgspec.json.encode(record).decode()


def _decoded(rows: Iterable[tuple[str, str]], kind: type[_Row]) -> Iterator[tuple[str, _Row]]:
    for key, record in rows:
        try:
            yield key, msgspec.json.decode(record, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            logger.warning("ignoring the ledger's record of %r: %s", key, exc)
