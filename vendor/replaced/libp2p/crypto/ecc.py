"""P-256 keys, refused. In the place of libp2p's module, which needs fastecdsa, a C extension on GMP.

libp2p uses them for SECIO alone, an encryption that it no longer offers and that p2pinfer never did.
"""

from __future__ import annotations

from typing import NoReturn

from libp2p.crypto.exceptions import CryptographyError
from libp2p.crypto.keys import KeyPair, KeyType, PrivateKey, PublicKey

_REFUSAL = "an ECDSA key is not supported: peers need an Ed25519 key"


class ECCPublicKey(PublicKey):
    def __init__(self, impl: object, curve: object) -> None:
        raise CryptographyError(_REFUSAL)

    @classmethod
    def from_bytes(cls, data: bytes, curve: str) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def to_bytes(self) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def get_type(self) -> KeyType:
        return KeyType.ECC_P256

    def verify(self, data: bytes, signature: bytes) -> NoReturn:
        raise CryptographyError(_REFUSAL)


class ECCPrivateKey(PrivateKey):
    def __init__(self, impl: object, curve: object) -> None:
        raise CryptographyError(_REFUSAL)

    @classmethod
    def new(cls, curve: str) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def to_bytes(self) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def get_type(self) -> KeyType:
        return KeyType.ECC_P256

    def sign(self, data: bytes) -> NoReturn:
        raise CryptographyError(_REFUSAL)

    def get_public_key(self) -> NoReturn:
        raise CryptographyError(_REFUSAL)


def infer_local_type(curve: str) -> NoReturn:
    raise CryptographyError(_REFUSAL)


def create_new_key_pair(curve: str) -> KeyPair:
    raise CryptographyError(_REFUSAL)
