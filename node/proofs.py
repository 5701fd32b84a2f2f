"""Fraud proofs on their way through the swarm: told of by content address, fetched, checked, carried on.

Who has a proof gossips a notice: the proof's digest, whom it is about, and who holds it. Whoever hears of it
fetches proof and tensors from the author, or from a neighbour who was faster, looks whether signatures and
digests hold, and keeps all of it for others. So a client that only dials can publish. Nobody is believed:
what a proof says of the arithmetic is for `on_proof` to see, by running the blocks again.

    notice (gossip) -> queue, bounded -> fetch, bounded -> signatures -> store -> on_proof

An author whose proof turns out to be false is not listened to any more. Authors cost nothing, so what counts
against a flood are the bounds: of notices per author and neighbour, of the queue, and of bytes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Protocol, TypeVar

import msgspec
import trio

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.reputation.proof import (
    MAX_PROOF_BYTES,
    Accusation,
    Proof,
    decode_proof,
    encode_proof,
    open_proof,
)
from p2pinfer.reputation.receipt import Payload, digest_of

from .evidence import MAX_DIGESTS, EvidenceStore, fetch_evidence
from .host import Host

logger = logging.getLogger(__name__)

MAX_NOTICE_BYTES: Final = 4096
MAX_TENSOR_BYTES: Final = 1 << 25  # of one proof
MAX_WAITING: Final = 32  # notices; what comes on top is dropped
MAX_REMEMBERED: Final = 4096  # proofs and authors
FETCHED_AT_ONCE: Final = 4  # one that nobody has must not hold up the others
NEIGHBOURS_ASKED: Final = 8
RETRIES_S: Final = (0.5, 2.0, 5.0, 15.0)  # between rounds: a neighbour may be fetching it just now

_Key = TypeVar("_Key", str, bytes)


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """That there is a proof. Travels as the payload of a sealed record, whose author holds the proof."""

    kind: Literal["proof"]
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    proof: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    accused: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    addrs: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(max_length=16)
    ] = ()


@dataclass(frozen=True, slots=True)
class Heard:
    """A notice and who published it."""

    notice: Notice
    author: str


OnProof = Callable[[Heard, Accusation, Mapping[bytes, Payload]], Awaitable[bool | None]]


class NoticeBoard(Protocol):
    """What carries notices: gossip."""

    async def publish_notice(self, notice: Notice) -> None:
        """Tell everybody in the notice's model's topic."""
        ...


_encoder: Final = msgspec.msgpack.Encoder()
_BEGINNING: Final = _encoder.encode("proof")
_decoder: Final = msgspec.msgpack.Decoder(Notice)


def encode_notice(notice: Notice) -> bytes:
    """The payload of a sealed record."""
    return _encoder.encode(notice)


def is_notice(payload: bytes) -> bool:
    """Whether a record's payload is meant to be a notice: an announcement begins with a number."""
    return payload[1:7] == _BEGINNING


def decode_notice(payload: bytes) -> Notice:
    """Raises ProtocolViolation for anything that is no notice."""
    if len(payload) > MAX_NOTICE_BYTES:
        raise ProtocolViolation(f"a notice of {len(payload)} bytes")
    try:
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("not a notice of a proof") from exc


class ProofCarrier:
    """Fetches the proofs it hears of, keeps them for others, and shows them to `on_proof`."""

    def __init__(self, host: Host, store: EvidenceStore, board: NoticeBoard) -> None:
        self.store = store
        # What looks at a proof. True: it proves what it says. False: it does not. None: that cannot be told.
        self.on_proof: OnProof | None = None
        self.is_wanted: Callable[[Heard], bool] = lambda _: True
        self._host = host
        self._board = board
        self._known: dict[bytes, None] = {}  # proofs; oldest first
        self._liars: dict[str, None] = {}
        self._heard_in, self._heard = trio.open_memory_channel[Heard](MAX_WAITING)

    def hear(self, heard: Heard) -> bool:
        """Take in a notice; whether others should get it."""
        if heard.author in self._liars or heard.notice.proof in self._known or not self.is_wanted(heard):
            return False
        try:
            self._heard_in.send_nowait(heard)
        except trio.WouldBlock:
            logger.debug("proof.too_many author=%s", heard.author)
            return False
        _remember(self._known, heard.notice.proof)
        return True

    async def publish(self, proof: Proof, contents: Mapping[bytes, Payload]) -> bytes:
        """Hold a proof of ours for the swarm and tell of it; returns its content address."""
        encoded = encode_proof(proof)
        address = digest_of(encoded)
        _remember(self._known, address)
        self.store.add(address, [(address, encoded), *contents.items()], trio.current_time())
        revision = open_proof(proof, self._host.verify).revision
        addrs = self._host.addrs[:16]
        await self._board.publish_notice(Notice("proof", revision, address, proof.peer_id, addrs))
        return address

    async def serve(self) -> None:
        """Fetch and check what was heard of, until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(FETCHED_AT_ONCE):
                nursery.start_soon(self._follow_all)

    async def _follow_all(self) -> None:
        async for heard in self._heard:
            try:
                await self._follow(heard)
            except ProtocolViolation as exc:
                logger.info("a proof by %s is none: %s", heard.author, exc)
                _remember(self._liars, heard.author)
            except PeerError as exc:
                logger.debug("proof.unavailable proof=%s why=%s", heard.notice.proof.hex(), exc)

    async def _follow(self, heard: Heard) -> None:
        notice = heard.notice
        encoded = (await self._fetch(heard, [notice.proof], MAX_PROOF_BYTES))[notice.proof]
        proof = decode_proof(encoded)
        accusation = await trio.to_thread.run_sync(open_proof, proof, self._host.verify)
        if (accusation.peer_id, accusation.revision) != (notice.accused, notice.revision):
            raise ProtocolViolation("a proof about somebody else than its notice says")
        contents = await self._fetch(heard, accusation.contents, MAX_TENSOR_BYTES)
        self.store.add(notice.proof, [(notice.proof, encoded), *contents.items()], trio.current_time())
        if self.on_proof is not None and await self.on_proof(heard, accusation, contents) is False:
            raise ProtocolViolation(f"what {notice.accused} computed is right")

    async def _fetch(self, heard: Heard, digests: Sequence[bytes], max_bytes: int) -> dict[bytes, bytes]:
        """All of `digests`, from whoever has them.

        Raises:
            PeerError: Nobody has all of them.
        """
        found: dict[bytes, bytes] = {}
        for delay_s in (0.0, *RETRIES_S):
            await trio.sleep(delay_s)
            for peer_id in self._holders(heard):
                missing = [digest for digest in digests if digest not in found]
                if not missing:
                    return found
                left = max_bytes - sum(map(len, found.values()))
                addrs = heard.notice.addrs if peer_id == heard.author else ()
                try:
                    found |= await fetch_evidence(
                        self._host, peer_id, missing[:MAX_DIGESTS], addrs, max_bytes=left
                    )
                except PeerError as exc:
                    logger.debug("proof.not_there peer=%s why=%s", peer_id, exc)
        if len(found) < len(set(digests)):
            raise PeerError(f"nobody has all of the proof against {heard.notice.accused}", heard.author)
        return found

    def _holders(self, heard: Heard) -> list[str]:
        """Whom to ask, the author first and again for what one answer did not hold; never the accused."""
        others = [
            peer_id
            for peer_id in self._host.connected_peers()
            if peer_id not in (heard.author, heard.notice.accused)
        ]
        random.shuffle(others)
        return [heard.author, *others[:NEIGHBOURS_ASKED]] * 4


def _remember(known: dict[_Key, None], key: _Key) -> None:
    known[key] = None
    if len(known) > MAX_REMEMBERED:
        del known[next(iter(known))]
