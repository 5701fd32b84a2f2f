"""SECIO's key exchange over P-256, refused. In the place of libp2p's module, which needs fastecdsa."""

from __future__ import annotations

from collections.abc import Callable

from libp2p.crypto.exceptions import CryptographyError
from libp2p.crypto.keys import PublicKey

SharedKeyGenerator = Callable[[bytes], bytes]


def create_ephemeral_key_pair(curve_type: str) -> tuple[PublicKey, SharedKeyGenerator]:
    raise CryptographyError("SECIO is not supported: connections are encrypted with Noise")
