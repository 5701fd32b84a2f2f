"""Keys on disk, peer ids, signatures."""

from __future__ import annotations

from pathlib import Path

import base58
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.rsa import create_new_key_pair as create_rsa_key_pair

from p2pinfer.errors import LocalError
from p2pinfer.node.transport.identity import KEY_FILE, is_peer_id, load_identity, new_identity, verify


def test_an_identity_survives_a_restart(tmp_path: Path) -> None:
    first = load_identity(tmp_path / "not" / "yet")
    assert load_identity(tmp_path / "not" / "yet").peer_id == first.peer_id
    assert first.peer_id.startswith("12D3KooW")


def test_the_key_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    load_identity(tmp_path)
    path = tmp_path / KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    load_identity(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_but_the_key_is_left_in_the_folder(tmp_path: Path) -> None:
    load_identity(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [KEY_FILE]


def test_of_two_processes_that_start_at_once_both_take_the_first_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_identity(tmp_path)

    def never(_: Path) -> bool:
        return False

    monkeypatch.setattr(Path, "exists", never)
    assert load_identity(tmp_path).peer_id == first.peer_id


@pytest.mark.parametrize("damage", [b"", b"not a key", b"\x08\x01\x12\x01a"])
def test_a_damaged_key_file_says_what_to_do(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / KEY_FILE).write_bytes(damage)
    with pytest.raises(LocalError, match="restore it from a backup, or delete it"):
        load_identity(tmp_path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(create_rsa_key_pair(1024).private_key.serialize())
    with pytest.raises(LocalError, match="no Ed25519 key"):
        load_identity(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match=KEY_FILE):
        load_identity(tmp_path / "file")


def test_a_signature_is_bound_to_its_peer_and_payload() -> None:
    alice, bob = new_identity(), new_identity()
    signature = alice.sign(b"payload")
    assert verify(alice.peer_id, b"payload", signature)
    assert not verify(alice.peer_id, b"another", signature)
    assert not verify(bob.peer_id, b"payload", signature)


@given(st.text(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_garbage_verifies_as_false(peer_id: str, payload: bytes, signature: bytes) -> None:
    assert not verify(peer_id, payload, signature)
    assert not verify(new_identity().peer_id, payload, signature)


def test_peer_ids_are_told_from_other_text() -> None:
    assert is_peer_id(new_identity().peer_id)
    assert not is_peer_id("")
    assert not is_peer_id("1" * 52)
    assert not is_peer_id("0" * 52)  # not in the alphabet
    assert not is_peer_id(
        base58.b58encode(bytes([0, 36, 8, 2, 18, 32]) + bytes(32)).decode()
    )  # another key type
