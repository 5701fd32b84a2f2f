"""Keys of private swarms: their files, and the cipher that they are for."""

from __future__ import annotations

from pathlib import Path

import nacl.bindings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pinfer.errors import ConfigError
from p2pinfer.node.transport.swarm_key import KEY_BYTES, NONCE_BYTES, load_swarm_key, make_swarm_key, xsalsa20


def test_the_stream_is_that_of_bernsteins_paper() -> None:
    """The first 32 bytes for the key and nonce of "Cryptography in NaCl", sections 8 and 9."""
    key = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    nonce = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
    expected = "eea6a7251c1e72916d11c2cb214d3c252539121d8e234e652d651fa4c8cff880"
    assert xsalsa20(key, nonce).encrypt(bytes(32)).hex() == expected


@settings(deadline=None)  # a shared machine may be slow
@given(
    st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES),
    st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES),
    st.binary(max_size=300),
)
def test_the_stream_is_libsodiums(key: bytes, nonce: bytes, text: bytes) -> None:
    """A secret box is XSalsa20 from its 33rd byte on, behind 16 bytes of authentication."""
    boxed = nacl.bindings.crypto_secretbox(text, nonce, key)[16:]
    assert xsalsa20(key, nonce).encrypt(bytes(32) + text)[32:] == boxed


def test_a_new_key_is_read_back_and_its_owners_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "swarm.key", tmp_path / "other.key"
    make_swarm_key(path)
    make_swarm_key(other)
    assert len(load_swarm_key(path)) == KEY_BYTES
    assert load_swarm_key(path) != load_swarm_key(other)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    make_swarm_key(path)
    key = load_swarm_key(path)
    with pytest.raises(ConfigError, match="is not overwritten"):
        make_swarm_key(path)
    assert load_swarm_key(path) == key


def test_a_key_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        make_swarm_key(tmp_path / "missing" / "swarm.key")


def test_a_key_file_of_another_program_is_read(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    path.write_text("/key/swarm/psk/1.0.0/\r\n/base16/\r\n" + "AB" * 32)
    assert load_swarm_key(path) == b"\xab" * 32


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"secret",
        b"\xff\xfe",
        b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"ab" * 31,
        b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"ab" * 33,
        b"/key/swarm/psk/1.0.0/\n/base64/\n" + b"ab" * 32,
    ],
)
def test_what_is_no_key_is_refused_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "swarm.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a swarm key") as caught:
        load_swarm_key(path)
    assert "abab" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.key cannot be read: No such file"):
        load_swarm_key(tmp_path / "none.key")
