"""secp256k1 keys, refused. In the place of libp2p's module, which needs coincurve, a C extension.

No peer of p2pinfer has such a key. What reads one, libp2p's handshake first of all, gets an error that says
so and is refused like any other handshake that fails.
"""

from __future__ import annotations

from typing import NoReturn

from libp2p.crypto.exceptions import CryptographyError
from libp2p.crypto.keys import KeyPair, KeyType, PrivateKey, PublicKey

_REFUSAL = "a secp256k1 key is not supported: peers need an Ed25519 key"


class Secp256k1PublicKey(PublicKey):
    def __init__(self, impl: object) -> None:
        raise CryptographyError(_REFUSAL)

    @classmethod
    def from_bytes(cls, data: bytes) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    @classmethod
    def deserialize(cls, data: bytes) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def to_bytes(self) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def get_type(self) -> KeyType:
        return KeyType.Secp256k1

    def verify(self, data: bytes, signature: bytes) -> NoReturn:
        raise CryptographyError(_REFUSAL)


class Secp256k1PrivateKey(PrivateKey):
    def __init__(self, impl: object) -> None:
        raise CryptographyError(_REFUSAL)

    @classmethod
    def new(cls, secret: bytes | None = None) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    @classmethod
    def from_bytes(cls, data: bytes) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    @classmethod
    def deserialize(cls, data: bytes) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def to_bytes(self) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def get_type(self) -> KeyType:
        return KeyType.Secp256k1

    def sign(self, data: bytes) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def get_public_key(self) -> NoReturn:
        raise CryptographyError(_REFUSAL)


def create_new_key_pair(secret: bytes | None = None) -> KeyPair:
    raise CryptographyError(_REFUSAL)
