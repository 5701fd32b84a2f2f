"""Files of a data directory, and who may read them."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from p2pinfer.folders import OWN_NAMES, make_private, write_private
from p2pinfer.generation.saved_state import keep_token
from p2pinfer.models.span import BlockSpan
from p2pinfer.node.data_lock import HOLDER_FILE, LOCK_FILE, hold_data_dir
from p2pinfer.node.host.last_ports import remember_ports
from p2pinfer.node.serve.last_span import remember_span
from p2pinfer.node.swarm.sequence import Sequence
from p2pinfer.node.transport.identity import load_identity
from p2pinfer.reputation.ledger import Ledger
from p2pinfer.reputation.store import FILE_NAME as LEDGER

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows keeps no such permissions")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def write_everything(data_dir: Path) -> None:
    """What a node and a client write in a data directory, while they run."""
    load_identity(data_dir)
    Sequence(data_dir)
    remember_ports(data_dir, ["/ip4/127.0.0.1/tcp/4001"])
    remember_span(data_dir, "revision", BlockSpan(0, 4))
    keep_token("p2pr2.token", data_dir)
    ledger = Ledger.open(data_dir / LEDGER)
    ledger.vouch("12D3KooWfriend")
    ledger.close()


@pytest.fixture
def open_umask() -> Generator[None]:
    """A system on which new files are readable by everybody."""
    former = os.umask(0)
    yield
    os.umask(former)


@pytest.mark.usefixtures("open_umask")
def test_whatever_is_written_is_this_users_alone(tmp_path: Path) -> None:
    data_dir = tmp_path / "new"
    with hold_data_dir(data_dir):
        write_everything(data_dir)
        names = {each.name for each in data_dir.iterdir()}
        assert {LEDGER, LOCK_FILE, HOLDER_FILE, "identity.key", "sequence", "resume"} <= names
        for path in (data_dir, *data_dir.rglob("*")):
            assert mode(path) & 0o077 == 0, path
            assert path.name == "new" or OWN_NAMES.fullmatch(path.name), path


@pytest.mark.usefixtures("open_umask")
def test_what_an_older_version_left_open_is_closed(tmp_path: Path) -> None:
    write_everything(tmp_path)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with hold_data_dir(tmp_path):
        pass
    assert mode(tmp_path) == 0o700
    assert {mode(each) for each in tmp_path.iterdir() if each.is_file()} == {0o600}
    assert mode(tmp_path / "resume") == 0o700


@pytest.mark.usefixtures("open_umask")
def test_a_client_closes_a_ledger_that_is_open_to_others(tmp_path: Path) -> None:
    """With the files that SQLite keeps beside it."""
    (tmp_path / LEDGER).touch(0o644)
    tmp_path.chmod(0o755)
    ledger = Ledger.open(tmp_path / LEDGER)
    ledger.vouch("12D3KooWfriend")
    ledger.flush()
    assert mode(tmp_path) == 0o700
    assert {mode(each) for each in tmp_path.iterdir()} == {0o600}
    ledger.close()


def test_a_folder_that_others_use_too_keeps_its_own_permissions(tmp_path: Path) -> None:
    shared, everybodys = tmp_path / "project", tmp_path / "tmp"
    for folder, folder_mode in ((shared, 0o755), (everybodys, 0o1777)):
        folder.mkdir()
        folder.chmod(folder_mode)
        (folder / "peers.json").write_text("[]")
        (folder / "peers.json").chmod(0o644)
    (shared / "notes.txt").write_text("for all to read")
    (shared / "notes.txt").chmod(0o644)
    for folder in (shared, everybodys):
        make_private(folder)
        assert mode(folder / "peers.json") == 0o600
    assert mode(shared) == 0o755
    assert mode(shared / "notes.txt") == 0o644
    assert everybodys.stat().st_mode & 0o1777 == 0o1777


def test_a_link_leads_to_no_change_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    elsewhere.chmod(0o644)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "identity.key").symlink_to(elsewhere)
    make_private(folder)
    assert mode(elsewhere) == 0o644


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_private(tmp_path / "sequence", b"1")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(tmp_path / "sequence", b"2", durable=True)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"1"]
