"""Swarm key of a private swarm, without which a connection ends at its first bytes.

libp2p's private networks (specs/pnet/Private-Networks-PSK-V1.md): each direction begins with 24 random bytes,
and what follows is combined with the XSalsa20 key stream of those bytes and of the key that all members
share. Noise runs inside, so this is not what keeps secrets: it decides who may talk to us at all. Why not
libp2p's own (0.8.1): it uses Salsa20 with 8 bytes, which no other implementation understands, and a peer
without the key is only noticed when a time-out has passed. `guarded.py` notices at once.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
from pathlib import Path
from typing import Final

from Crypto.Cipher import Salsa20

from p2pinfer.errors import ConfigError
from p2pinfer.text_files import decode_text

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 24

# The format in which go-libp2p and its relatives keep such a key, each part on a line.
_FORMAT: Final = re.compile(r"/key/swarm/psk/1\.0\.0/\s+/base16/\s+([0-9a-fA-F]{64})\s*")
_MAX_FILE_BYTES: Final = 4096
_SIGMA: Final = struct.unpack("<4I", b"expand 32-byte k")


def make_swarm_key(path: Path) -> None:
    """Write a new key into a file that is not there yet, readable by its owner alone.

    Raises:
        ConfigError: The file exists, or cannot be written.
    """
    text = f"/key/swarm/psk/1.0.0/\n/base16/\n{secrets.token_hex(KEY_BYTES)}\n"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already and is not overwritten; choose another name") from None
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from exc


def load_swarm_key(path: Path) -> bytes:
    """The 32 bytes in a key file, in the format that all of libp2p reads.

    Raises:
        ConfigError: The file cannot be read, or is no swarm key. The message does not repeat its content.
    """
    try:
        with path.open("rb") as file:
            text = decode_text(file.read(_MAX_FILE_BYTES))
    except OSError as exc:
        raise ConfigError(f"the swarm key {path} cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError:
        text = ""
    match = _FORMAT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{path} is not a swarm key; make one with `p2pinfer keygen FILE`")
    return bytes.fromhex(match[1])


def xsalsa20(key: bytes, nonce: bytes) -> Salsa20.Salsa20Cipher:
    """The stream cipher of 32 bytes of key and 24 of nonce; D. J. Bernstein, Extending the Salsa20 nonce."""
    return Salsa20.new(key=_hsalsa20(key, nonce[:16]), nonce=nonce[16:])


def _hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """The key for the nonce's second part. Once a connection, so Python does."""
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    x = [_SIGMA[0], *k[:4], _SIGMA[1], *n, _SIGMA[2], *k[4:], _SIGMA[3]]
    for _ in range(10):
        for column in range(4):
            _quarter_round(x, *(5 * column % 16, *((5 * column + 4 * step) % 16 for step in (1, 2, 3))))
        for row in range(4):
            _quarter_round(x, *(4 * row + (row + step) % 4 for step in range(4)))
    return struct.pack("<8I", *(x[at] for at in (0, 5, 10, 15, 6, 7, 8, 9)))


def _quarter_round(x: list[int], a: int, b: int, c: int, d: int) -> None:
    for target, left, right, by in ((b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (a, d, c, 18)):
        total = (x[left] + x[right]) & 0xFFFFFFFF
        x[target] ^= (total << by | total >> (32 - by)) & 0xFFFFFFFF
