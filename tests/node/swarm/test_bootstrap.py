"""Where the first peers' addresses come from, and what is said of a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pinfer.errors import ConfigError
from p2pinfer.node.swarm import bootstrap
from p2pinfer.node.swarm.bootstrap import FILE_NAME, bootstrap_peers
from p2pinfer.node.transport.identity import new_identity

ALICE, BOB = new_identity().peer_id, new_identity().peer_id
ALICE_ADDR = f"/ip4/192.0.2.1/tcp/4001/p2p/{ALICE}"
ALICE_ADDR6 = f"/ip6/2001:db8::1/tcp/4001/p2p/{ALICE}"
BOB_ADDR = f"/dns4/bob.example/tcp/4001/p2p/{BOB}"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """Working directory, data directory, package, all of them without any peers."""
    paths = tmp_path / "work", tmp_path / "data", tmp_path / "package"
    for path in paths:
        path.mkdir()
    monkeypatch.chdir(paths[0])
    monkeypatch.setattr(bootstrap, "__file__", str(paths[2] / "node" / "swarm" / "bootstrap.py"))
    return paths


def test_addresses_given_are_taken_and_no_file_is_read(folders: tuple[Path, Path, Path]) -> None:
    (folders[0] / FILE_NAME).write_text("nonsense")
    [alice, bob] = bootstrap_peers([ALICE_ADDR, BOB_ADDR, ALICE_ADDR6], folders[1])
    assert (alice.peer_id, alice.addrs) == (ALICE, (ALICE_ADDR, ALICE_ADDR6))
    assert (bob.peer_id, bob.addrs) == (BOB, (BOB_ADDR,))


def test_the_first_file_that_names_anybody_counts(folders: tuple[Path, Path, Path]) -> None:
    work, data, package = folders
    assert bootstrap_peers((), data) == ()
    (package / FILE_NAME).write_text(f"{ALICE_ADDR}\n")
    assert [peer.peer_id for peer in bootstrap_peers((), data)] == [ALICE]
    (data / FILE_NAME).write_text(f"# ours\n\n  {BOB_ADDR}  # bob\n")
    assert [peer.peer_id for peer in bootstrap_peers((), data)] == [BOB]
    (work / FILE_NAME).write_text("# nobody yet\n")
    assert [peer.peer_id for peer in bootstrap_peers((), data)] == [BOB]
    (work / FILE_NAME).write_text(ALICE_ADDR)
    assert [peer.peer_id for peer in bootstrap_peers((), data)] == [ALICE]


def test_a_bad_line_is_named(folders: tuple[Path, Path, Path]) -> None:
    (folders[1] / FILE_NAME).write_text(f"# first\n{ALICE_ADDR}\n/ip4/192.0.2.1/tcp/4001\n")
    with pytest.raises(ConfigError, match=rf"{FILE_NAME}, line 3: .*/p2p/"):
        bootstrap_peers((), folders[1])


def test_a_bad_flag_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--bootstrap: 'nonsense'"):
        bootstrap_peers(["nonsense"], tmp_path)


def test_a_file_that_cannot_be_read_is_named(folders: tuple[Path, Path, Path]) -> None:
    (folders[1] / FILE_NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=f"{FILE_NAME} cannot be read"):
        bootstrap_peers((), folders[1])


def test_the_file_that_is_shipped_names_nobody_or_somebody_who_can_be_dialled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(peer.addrs for peer in bootstrap_peers((), tmp_path))
