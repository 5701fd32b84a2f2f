"""Identity of this process: an Ed25519 key, and the peer id that is its public half."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import base58
from libp2p.crypto.ed25519 import Ed25519PrivateKey, Ed25519PublicKey, create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.serialization import deserialize_private_key
from libp2p.peer.id import ID

from p2pinfer.errors import LocalError
from p2pinfer.folders import expand

KEY_FILE = "identity.key"

# A peer id of an Ed25519 key holds the key itself: an identity multihash (0x00) of the 36 bytes that
# libp2p's PublicKey message takes: key_type = Ed25519, data = 32 bytes. -- peer-ids spec, "Keys"
_PEER_ID_PREFIX = bytes([0x00, 36, 0x08, 0x01, 0x12, 32])


@dataclass(frozen=True)
class Identity:
    """A key pair and the peer id that follows from it."""

    key_pair: KeyPair
    peer_id: str  # base58, "12D3Koo..."
    lasting: bool = False  # whether it is kept in a file

    @property
    def sign(self) -> Callable[[bytes], bytes]:
        """Function that makes the 64-byte Ed25519 signature of a payload."""
        return self.key_pair.private_key.sign


def new_identity() -> Identity:
    """An identity that is kept nowhere, for a process that only asks."""
    return _identity_of(create_new_key_pair())


def client_identity(given: Identity | str | Path | None) -> Identity:
    """Identity of a client: the one given, the lasting one of a file, made on first use, or a fresh one.

    Raises:
        LocalError: As `load_identity_file`.
    """
    if isinstance(given, Identity):
        return given
    return new_identity() if given is None else load_identity_file(expand(given))


def load_identity(data_dir: Path) -> Identity:
    """A node's identity, kept in `data_dir`; see `load_identity_file`."""
    return load_identity_file(data_dir / KEY_FILE)


def load_identity_file(path: Path) -> Identity:
    """The identity kept in a file, made on first use.

    The file holds libp2p's PrivateKey message, as other libp2p programs write it, and is readable by its
    owner alone.

    Raises:
        LocalError: The file cannot be read, written, or understood.
    """
    try:
        if not path.exists():
            _create(path)
        if path.stat().st_mode & 0o077 and os.name == "posix":
            path.chmod(0o600)
        encoded = path.read_bytes()
    except OSError as exc:
        raise LocalError(
            f"cannot save an identity in {path}: {exc.strerror or exc}; choose another folder with --data-dir"
        ) from exc
    try:
        private_key = deserialize_private_key(encoded)
        if not isinstance(private_key, Ed25519PrivateKey):
            raise ValueError("not an Ed25519 key")
        return replace(_identity_of(KeyPair(private_key, private_key.get_public_key())), lasting=True)
    except Exception as exc:  # protobuf and PyNaCl each have errors of their own
        raise LocalError(
            f"{path} holds no Ed25519 key: restore it from a backup, or delete it to become a new peer"
        ) from exc


def verify(peer_id: str, payload: bytes, signature: bytes) -> bool:
    """True if `signature` over `payload` was made by the owner of `peer_id`; False for anything malformed."""
    peer = _peer_of(peer_id)
    try:
        return peer is not None and peer[1].verify(payload, signature)
    except ValueError:  # PyNaCl's, for a signature of a wrong length
        return False


def is_peer_id(text: str) -> bool:
    """True if `text` is the peer id of an Ed25519 key, the only kind that p2pinfer's peers have."""
    return _peer_of(text) is not None


def libp2p_id(peer_id: str) -> ID | None:
    """`peer_id` as libp2p has it; None if it is none of an Ed25519 key."""
    peer = _peer_of(peer_id)
    return None if peer is None else peer[0]


@lru_cache(maxsize=4096)  # 20 us a time otherwise, and every receipt, and every look at a connection, asks
def _peer_of(peer_id: str) -> tuple[ID, Ed25519PublicKey] | None:
    if not 46 <= len(peer_id) <= 60:  # base58 takes quadratic time; these hold 38 bytes
        return None
    try:
        decoded = base58.b58decode(peer_id)
    except ValueError:
        return None
    if len(decoded) != len(_PEER_ID_PREFIX) + 32 or not decoded.startswith(_PEER_ID_PREFIX):
        return None
    return ID(decoded), Ed25519PublicKey.from_bytes(decoded[len(_PEER_ID_PREFIX) :])


def _identity_of(key_pair: KeyPair) -> Identity:
    return Identity(key_pair, ID.from_pubkey(key_pair.public_key).to_base58())


def _create(path: Path) -> None:
    """Write a new key so that no reader ever sees half of one, and the first of two writers wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(create_new_key_pair().private_key.serialize())
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process of ours was faster: its key it is
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
