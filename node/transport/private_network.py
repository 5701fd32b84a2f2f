"""Preamble of a private network: a connection whose peer must first show the swarm key.

Whatever libp2p says first on a connection is known, `GREETING`, and both sides say it before they listen. So
each side knows after some twenty bytes whether the other one speaks libp2p, and has the same swarm key or, as
we do, none; and can name the reason. Without this a wrong key looks like a peer that says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

from .raw_stream import RawStream
from .swarm_key import NONCE_BYTES, xsalsa20

GREETING: Final = b"\x13/multistream/1.0.0\n"


class StrangerMet(ConnectionClosedError):
    """The peer is not of our swarm; the message says what gave it away."""


class Guarded(ReadWriteCloser):
    """`inner`, encrypted for the private swarm of `key` if there is one.

    Like `inner`'s, a write takes its bytes before the first suspension.

    Args:
        on_stranger: Called with the peer's address and with why it is turned away.
    """

    def __init__(self, inner: RawStream, key: bytes | None, on_stranger: Callable[[str, str], None]) -> None:
        self.inner = inner
        self._key = key
        self._on_stranger = on_stranger
        self._seal: Any = None  # ciphers, once the direction has begun
        self._open: Any = None
        self._begun: bytes | None = None  # what the peer began with, as far as it was not handed out

    async def write(self, data: bytes) -> None:
        await self.inner.write(self._sealed(data))

    @property
    def is_clear(self) -> bool:
        """See `RawStream.is_clear`."""
        return self.inner.is_clear

    def write_now(self, data: bytes) -> bool:
        """See `RawStream.write_now`."""
        return self.inner.is_clear and self.inner.write_now(self._sealed(data))

    def after_greeting(self) -> RawStream | Guarded:
        """The stream to go on with once the greeting was read: `inner` itself where nothing is encrypted."""
        return self.inner if self._key is None and self._begun == b"" else self

    def _sealed(self, data: bytes) -> bytes:
        if self._key is None:
            return data
        nonce = b""
        if self._seal is None:
            nonce = os.urandom(NONCE_BYTES)
            self._seal = xsalsa20(self._key, nonce)
        return bytes(nonce + self._seal.encrypt(data))

    async def read(self, n: int | None = None) -> bytes:
        """Raises StrangerMet, on the first read, if the peer is not of our swarm."""
        if self._begun is None:
            try:
                self._begun = await self._read_greeting()
            except StrangerMet as exc:
                address = self.get_remote_address()
                self._on_stranger(address[0] if address else "somebody", str(exc))
                raise
        if self._begun:
            piece = self._begun[:n]
            self._begun = self._begun[len(piece) :]
            return piece
        received = await self.inner.read(n)
        return received if self._open is None else self._open.decrypt(received)

    async def close(self) -> None:
        await self.inner.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.inner.get_remote_address()

    async def _read_greeting(self) -> bytes:
        if self._key is None:
            if await self._read_alike() != GREETING:
                raise StrangerMet("it speaks no libp2p, or is of a private swarm whose key we lack")
            return GREETING
        begun = await self._read_alike()
        if begun == GREETING:
            raise StrangerMet("it lacks the key of this private swarm")
        while len(begun) < NONCE_BYTES + len(GREETING):
            begun += await self.inner.read(NONCE_BYTES + len(GREETING) - len(begun))
        self._open = xsalsa20(self._key, begun[:NONCE_BYTES])
        if self._open.decrypt(begun[NONCE_BYTES:]) != GREETING:
            raise StrangerMet("it has another key than this private swarm")
        return GREETING

    async def _read_alike(self) -> bytes:
        """The greeting, or the first bytes that are none."""
        begun = b""
        while len(begun) < len(GREETING) and GREETING.startswith(begun):
            begun += await self.inner.read(len(GREETING) - len(begun))
        return begun
