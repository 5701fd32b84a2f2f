"""Noise transport messages after libp2p's handshake, encrypted with few calls for each.

A message is a big-endian u16 length and so many bytes of ciphertext, its tag included. -- libp2p specs,
noise/README.md, "Wire Format". The nonce is 32 bits of zeros and a little-endian u64 that counts the messages
of a direction. -- Noise, revision 34, section 12.3
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.exceptions import CryptographyError, MissingDeserializerError
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.peer.id import ID
from libp2p.security.noise.exceptions import NoiseFailure
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.security.secure_session import SecureSession

from p2pinfer.node.concurrency.loop_share import LoopShares

from .private_network import Guarded
from .raw_stream import RawStream

_LENGTH: Final = struct.Struct(">H")
_NONCE: Final = struct.Struct("<IQ")
_TOOK: Final = "handshake_s"  # the attribute that tells how long a handshake took
_MESSAGES_A_TURN: Final = 256  # of a byte each, thousands come at once


class NoiseHandshake(NoiseTransport):
    """libp2p's handshake, which fails in one way whatever the peer has sent.

    Args:
        key_pair: This host's identity.
        on_unusable_key: Called with the address of whoever connects with a key that is not supported, and
            with a sentence that says so. A peer that we dial has told its key in its peer id.
    """

    def __init__(self, key_pair: KeyPair, on_unusable_key: Callable[[str, str], None]) -> None:
        super().__init__(key_pair, noise_privkey=create_noise_key_pair().private_key)
        self._on_unusable_key = on_unusable_key

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Raises NoiseFailure: The peer is gone, or sent what does not belong here."""
        began_at = trio.current_time()
        try:
            with _failing_as_noise():
                return _timed(await super().secure_inbound(conn), began_at)
        except UnusableKey as exc:
            address = conn.get_remote_address()
            self._on_unusable_key(address[0] if address else "a relay", str(exc))
            raise

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Raises NoiseFailure: The peer is gone, or another, or sent what does not belong here."""
        began_at = trio.current_time()
        with _failing_as_noise():
            return _timed(await super().secure_outbound(conn, peer_id), began_at)


def _timed(shaken: ISecureConn, began_at: float) -> ISecureConn:
    setattr(shaken, _TOOK, trio.current_time() - began_at)
    return shaken


class UnusableKey(NoiseFailure):
    """The peer's identity is a key of a kind that we do not read."""


@contextmanager
def _failing_as_noise() -> Generator[None]:
    """libp2p's upgrader knows no ValueError, which is what a payload that cannot be read raises."""
    try:
        yield
    except ValueError as exc:
        if isinstance(why := exc.__context__, CryptographyError):
            raise UnusableKey(_sentence(why)) from exc
        raise NoiseFailure(str(exc)) from exc


def _sentence(why: CryptographyError) -> str:
    if isinstance(why, MissingDeserializerError):  # holds a dict; the numbers are those of the peer-ids spec
        return "a key of its kind (ECDSA, or one without a name) is not supported: peers need an Ed25519 key"
    return str(why)


class NoiseSession(SecureSession):
    """A connection after libp2p's handshake.

    Attributes:
        stream: Carries the messages; while it `is_clear`, `write_now` will do.
        handshake_s: Seconds that the handshake took: a round trip for who dials, up to two for the other.
    """

    def __init__(self, shaken: SecureSession) -> None:
        """Takes the place of libp2p's own, which nobody must have used yet."""
        assert isinstance(shaken.conn, NoiseTransportReadWriter)
        self.messages = NoiseMessages(shaken.conn)
        self.meter = LoopShares().meter(str(shaken.remote_peer), "")  # what the peer's messages take
        self.stream = self.messages.stream
        self.handshake_s: float = getattr(shaken, _TOOK, 0.0)
        super().__init__(
            local_peer=shaken.local_peer,
            local_private_key=shaken.local_private_key,
            remote_peer=shaken.remote_peer,
            remote_permanent_pubkey=shaken.remote_permanent_pubkey,
            is_initiator=shaken.is_initiator,
            conn=self.messages,
        )

    async def read(self, n: int | None = None) -> bytes:
        """The next message, once the peer's messages take no more than their part of the event loop.

        Raises:
            Overspent: The peer has had to wait for too long.
        """
        if self.meter.shares.is_over:
            await self.meter.pause()
        return await super().read(n)

    @property
    def raw(self) -> RawStream:
        """The bytes below, whether a socket or a relay carries them."""
        return self.stream.inner if isinstance(self.stream, Guarded) else self.stream

    def write_now(self, data: bytes) -> bool:
        """Write `data` if it fits one message and nobody is before it; False, with nothing written, if not.

        What cannot be sent at once goes out with the next `write`, be it empty.
        """
        # Asked before the message is sealed: one that is sealed counts, and has to be sent before any other.
        if len(data) > MAX_PLAINTEXT_LENGTH or not self.stream.is_clear:
            return False
        return self.stream.write_now(self.messages.seal(data))


class NoiseMessages(NoiseTransportReadWriter):
    """Takes the place of libp2p's own before the first message, and reads as much as has come at once.

    A message is encrypted and taken by the stream below without a suspension in between.
    """

    def __init__(self, replaced: NoiseTransportReadWriter) -> None:
        connection: Any = replaced.read_writer.read_write_closer
        super().__init__(connection, replaced.noise_state)
        protocol: Any = replaced.noise_state.noise_protocol
        # Below libp2p's RawConnection, which only passes on what that does.
        stream: RawStream | Guarded = connection.stream
        self.stream = stream.after_greeting() if isinstance(stream, Guarded) else stream
        self._seal = protocol.cipher_state_encrypt.cipher.cipher.encrypt
        self._open = protocol.cipher_state_decrypt.cipher.cipher.decrypt
        self._sealed = 0  # messages
        self._opened = 0
        self._received = b""
        self._at = 0  # how much of it was read

    def encrypt(self, data: bytes) -> bytes:
        nonce = _NONCE.pack(0, self._sealed)
        self._sealed += 1
        return bytes(self._seal(nonce, data, None))

    def decrypt(self, data: bytes) -> bytes:
        """Raises InvalidTag for what is not the peer's next message."""
        nonce = _NONCE.pack(0, self._opened)
        self._opened += 1
        return bytes(self._open(nonce, data, None))

    async def read_msg(self, prefix_encoded: bool = False) -> bytes:
        """The next message.

        Raises:
            ConnectionClosedError: The connection has ended.
            InvalidTag: Somebody has changed the message.
        """
        if not self._opened % _MESSAGES_A_TURN:
            await trio.lowlevel.checkpoint()
        while (message := self._next_message()) is None:
            self._received = self._received[self._at :] + await self.stream.read()
            self._at = 0
        return self.decrypt(message)

    async def write_msg(self, msg: bytes, prefix_encoded: bool = False) -> None:
        """Send `msg`, in as many messages as it takes; none if it is empty, but what is left of others.

        Raises:
            ConnectionClosedError: The connection has ended.
        """
        if not msg:
            await self.stream.write(b"")
        for start in range(0, len(msg), MAX_PLAINTEXT_LENGTH):
            await self.stream.write(self.seal(msg[start : start + MAX_PLAINTEXT_LENGTH]))

    def seal(self, data: bytes) -> bytes:
        """The next message as it travels; it must be sent before any other."""
        sealed: bytes = self._seal(_NONCE.pack(0, self._sealed), data, None)
        self._sealed += 1
        return _LENGTH.pack(len(sealed)) + sealed

    def _next_message(self) -> bytes | None:
        begin = self._at + _LENGTH.size
        if begin > len(self._received):
            return None
        end = begin + _LENGTH.unpack_from(self._received, self._at)[0]
        if end > len(self._received):
            return None
        self._at = end
        return self._received[begin:end]
