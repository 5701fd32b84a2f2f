"""Peers of libp2p whose identity is no Ed25519 key: refused with a sentence, and nothing else happens."""

from __future__ import annotations

import logging

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.keys import KeyPair, KeyType, PrivateKey, PublicKey
from libp2p.crypto.rsa import create_new_key_pair as create_rsa_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

from p2pinfer.errors import PeerUnreachable
from p2pinfer.node.host.host import Host
from p2pinfer.node.transport.identity import new_identity

from .support import ECHO, StartHost, echo, receive_exactly


class Key(PublicKey):
    """Says that it is of `kind`, and is `encoded`."""

    def __init__(self, kind: KeyType, encoded: bytes) -> None:
        self._kind = kind
        self._encoded = encoded

    def to_bytes(self) -> bytes:
        return self._encoded

    def get_type(self) -> KeyType:
        return self._kind

    def verify(self, data: bytes, signature: bytes) -> bool:
        raise NotImplementedError


class EllipticKey(PrivateKey):
    """Signs as the peer-ids spec says for secp256k1 and ECDSA: ECDSA over SHA-256, in DER."""

    def __init__(self, secret: ec.EllipticCurvePrivateKey, public: Key) -> None:
        self._secret = secret
        self._public = public

    def to_bytes(self) -> bytes:
        raise NotImplementedError

    def get_type(self) -> KeyType:
        return self._public.get_type()

    def sign(self, data: bytes) -> bytes:
        return self._secret.sign(data, ec.ECDSA(hashes.SHA256()))

    def get_public_key(self) -> PublicKey:
        return self._public


def key_pair(kind: KeyType) -> KeyPair:
    """As other implementations make them; of Ed25519 one that is too short."""
    if kind is KeyType.RSA:
        return create_rsa_key_pair(1024)
    secret = ec.generate_private_key(ec.SECP256R1() if kind is KeyType.ECDSA else ec.SECP256K1())
    if kind is KeyType.ECDSA:
        encoded = secret.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    else:
        encoded = secret.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    public = Key(kind, encoded[:31] if kind is KeyType.Ed25519 else encoded)
    return KeyPair(EllipticKey(secret, public), public)


def stranger(keys: KeyPair) -> IHost:
    """A host of libp2p's own, with that identity."""
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=keys, sec_opt={NOISE: noise})


async def talks(near: Host, far: Host) -> bool:
    """Whether two hosts of ours still hear each other."""
    far.serve(ECHO, echo)
    async with await near.open_stream(far.peer_id, ECHO, far.addrs) as stream:
        await stream.send_all(b"hello")
        return await receive_exactly(stream, 5) == b"hello"


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (KeyType.Secp256k1, "a secp256k1 key is not supported: peers need an Ed25519 key"),
        (KeyType.ECDSA, "a key of its kind (ECDSA, or one without a name) is not supported"),
        (KeyType.ECC_P256, "a key of its kind (ECDSA, or one without a name) is not supported"),
        (KeyType.Ed25519, ""),  # what is no key at all is a broken handshake, of which scanners make many
    ],
)
async def test_who_connects_with_another_kind_of_key_is_turned_away(
    start_host: StartHost, caplog: pytest.LogCaptureFixture, kind: KeyType, sentence: str
) -> None:
    bob = await start_host()
    theirs = stranger(key_pair(kind))
    with caplog.at_level(logging.WARNING):
        async with theirs.run([]):
            address = Multiaddr(bob.addrs[0].partition("/p2p/")[0])
            with pytest.raises(BaseLibp2pError):
                connection = await theirs.get_network().dial_addr(address, ID.from_base58(bob.peer_id))
                await connection.new_stream()  # Noise has the dialling side finish first
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("p2pinfer.node")]
    assert len(warnings) == bool(sentence)
    assert all(f"rejected a connection from 127.0.0.1: {sentence}" in each for each in warnings)
    assert bob.connected_peers() == []
    assert await talks(await start_host(), bob)


@pytest.mark.parametrize("kind", [KeyType.Secp256k1, KeyType.ECDSA, KeyType.Ed25519, KeyType.RSA])
async def test_who_answers_with_another_kind_of_key_is_unreachable(
    start_host: StartHost, kind: KeyType
) -> None:
    alice, bob = await start_host(), await start_host()
    theirs = stranger(key_pair(kind))
    async with theirs.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        address = str(theirs.get_addrs()[0]).partition("/p2p/")[0]
        with pytest.raises(PeerUnreachable):
            await alice.connect(new_identity().peer_id, [address])
        with pytest.raises(PeerUnreachable, match="not a peer id of an Ed25519 key"):
            await alice.connect(theirs.get_id().to_base58(), [address])
    assert alice.connected_peers() == []
    assert await talks(alice, bob)
