"""Gossip of fraud proofs: notices by content address, then fetched, checked and passed on.

Who has a proof gossips a notice: the proof's digest, whom it is about, and who holds it. Whoever hears of it
fetches proof and tensors from the author, or from a neighbour who was faster, looks whether signatures and
digests hold, and keeps all of it for others. So a client that only dials can publish, and leave. Who comes
later is told with a neighbour's table. Nobody is believed: what a proof says of the arithmetic is for
`on_proof` to see, by running the blocks again.

    notice (gossip, snapshot) -> queue, bounded -> fetch, bounded -> signatures -> store -> on_proof

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
from p2pinfer.node.evidence.store import MAX_DIGESTS, EvidenceStore, fetch_evidence
from p2pinfer.node.host.host import Host
from p2pinfer.recent import Recent
from p2pinfer.reputation.proof import (
    MAX_PROOF_BYTES,
    Accusation,
    Proof,
    decode_proof,
    encode_proof,
    open_proof,
)
from p2pinfer.reputation.receipt import CheckSignature, Payload, digest_of

logger = logging.getLogger(__name__)

MAX_NOTICE_BYTES: Final = 4096
MAX_TENSOR_BYTES: Final = 1 << 25  # of one proof
MAX_WAITING: Final = 32  # notices; what comes on top is dropped
MAX_REMEMBERED: Final = 4096  # proofs and authors
MAX_TOLD: Final = 64  # notices that a newcomer is told of
FETCHED_AT_ONCE: Final = 4  # one that nobody has must not hold up the others
NEIGHBOURS_ASKED: Final = 8
RETRIES_S: Final = (0.5, 2.0, 5.0, 15.0)  # between rounds: a neighbour may be fetching it just now

_Key = TypeVar("_Key", str, bytes)


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """News of a proof. Travels as the payload of a sealed record, whose author holds the proof."""

    kind: Literal["proof"]
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    proof: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    accused: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    addrs: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(max_length=16)
    ] = ()


@dataclass(frozen=True, slots=True)
class Heard:
    """A notice and who published it.

    Attributes:
        record: The notice as its author sealed it, for others.
        told_by: Who passed it on, and may hold the proof as well; empty if that is not known.
    """

    notice: Notice
    author: str
    record: bytes = b""
    told_by: str = ""


OnProof = Callable[[Heard, Accusation, Mapping[bytes, Payload]], Awaitable[bool | None]]


class NoticeBoard(Protocol):
    """Carrier of notices: gossip."""

    async def publish_notice(self, notice: Notice) -> bytes:
        """Tell everybody in the notice's model's topic; returns the sealed record that they get."""
        ...


_encoder: Final = msgspec.msgpack.Encoder()
_BEGINNING: Final = _encoder.encode("proof")
_decoder: Final = msgspec.msgpack.Decoder(Notice)


def encode_notice(notice: Notice) -> bytes:
    """The payload of a sealed record."""
    return _encoder.encode(notice)


def is_notice(payload: bytes) -> bool:
    """True if a record's payload is meant to be a notice: an announcement begins with a number."""
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
        self._on_proof: OnProof | None = None
        self._is_wanted: Callable[[Heard], bool] = lambda _: True
        self._host = host
        self._board = board
        self._known: dict[bytes, None] = {}  # proofs; oldest first
        self._liars: dict[str, None] = {}
        self._handing_out: dict[bytes, trio.Event] = {}  # proofs of ours
        # By proof that is here: the notice, since when.
        self._held = Recent[bytes, tuple[Heard, float]](MAX_TOLD)
        self._heard_in, self._heard = trio.open_memory_channel[Heard](MAX_WAITING)

    def attach(self, on_proof: OnProof, is_wanted: Callable[[Heard], bool]) -> None:
        """Let somebody look at proofs, those included that have come already.

        Args:
            on_proof: True: it proves what it says. False: it does not. None: that cannot be told.
            is_wanted: Whether a proof is worth fetching and looking at.
        """
        self._on_proof, self._is_wanted = on_proof, is_wanted
        for heard, _ in self._held.values():
            if is_wanted(heard):
                self._queue(heard)

    def hear(self, heard: Heard) -> bool:
        """Take in a notice; whether others should get it."""
        if heard.author in self._liars or heard.notice.proof in self._known or not self._is_wanted(heard):
            return False
        if not self._queue(heard):
            return False
        _remember(self._known, heard.notice.proof)
        return True

    def _queue(self, heard: Heard) -> bool:
        try:
            self._heard_in.send_nowait(heard)
        except trio.WouldBlock:
            logger.debug("proof.too_many author=%s", heard.author)
            return False
        return True

    async def publish(self, proof: Proof, contents: Mapping[bytes, Payload]) -> bytes:
        """Hold a proof of ours for the swarm and tell of it; returns its content address."""
        encoded, address, revision = await trio.to_thread.run_sync(_prepare, proof, self._host.verify)
        _remember(self._known, address)
        self._keep(address, encoded, contents)
        self._handing_out[address] = self.store.watch(address)
        notice = Notice("proof", revision, address, proof.peer_id, self._host.addrs[:16])
        self._note(Heard(notice, self._host.peer_id, await self._board.publish_notice(notice)))
        return address

    async def handed_out(self, address: bytes) -> None:
        """Wait until somebody else has all of a proof that was published here."""
        if (event := self._handing_out.get(address)) is not None:
            await event.wait()
            self._handing_out.pop(address, None)

    def records(self, revision: str | None = None) -> list[tuple[bytes, float]]:
        """Sealed notices of the proofs that are here, with their ages in seconds, youngest first."""
        now = trio.current_time()
        for proof in [proof for proof in self._held if self.store.get(proof, now) is None]:
            del self._held[proof]
        return [
            (heard.record, now - since)
            for heard, since in reversed(list(self._held.values()))
            if revision in (None, heard.notice.revision)
        ]

    def _keep(self, address: bytes, encoded: bytes, contents: Mapping[bytes, Payload]) -> None:
        self.store.add(address, [(address, encoded), *contents.items()], trio.current_time())

    def _note(self, heard: Heard) -> None:
        """Tell newcomers of a proof that is here."""
        self._held[heard.notice.proof] = heard, trio.current_time()

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
                self._known.pop(heard.notice.proof, None)  # another one may bring it

    async def _follow(self, heard: Heard) -> None:
        notice = heard.notice
        encoded = (await self._fetch(heard, [notice.proof], MAX_PROOF_BYTES))[notice.proof]
        accusation = await trio.to_thread.run_sync(_open, encoded, self._host.verify)
        if (accusation.peer_id, accusation.revision) != (notice.accused, notice.revision):
            raise ProtocolViolation("a proof about somebody else than its notice says")
        contents = await self._fetch(heard, accusation.contents, MAX_TENSOR_BYTES)
        self._keep(notice.proof, encoded, contents)
        self._note(heard)
        if self._on_proof is not None and await self._on_proof(heard, accusation, contents) is False:
            self._held.pop(notice.proof, None)
            raise ProtocolViolation(f"what {notice.accused} computed is right")

    async def _fetch(self, heard: Heard, digests: Sequence[bytes], max_bytes: int) -> dict[bytes, bytes]:
        """All of `digests`, from whoever has them.

        Raises:
            PeerError: Nobody has all of them.
        """
        now = trio.current_time()
        here = {digest: self.store.get(digest, now) for digest in digests}
        found = {digest: bytes(content) for digest, content in here.items() if content is not None}
        if len(found) == len(here):
            return found
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
        """Peers to ask, first tellers first, again for what one answer did not hold; never the accused."""
        first = dict.fromkeys([heard.told_by or heard.author, heard.author])
        others = [
            peer_id
            for peer_id in self._host.connected_peers()
            if peer_id not in first and peer_id != heard.notice.accused
        ]
        random.shuffle(others)
        return [*(each for each in first if each != heard.notice.accused), *others[:NEIGHBOURS_ASKED]] * 4


def _prepare(proof: Proof, check: CheckSignature) -> tuple[bytes, bytes, str]:
    """The proof as it travels, its content address, and the model that it is about."""
    encoded = encode_proof(proof)
    return encoded, digest_of(encoded), open_proof(proof, check).revision


def _open(encoded: bytes, check: CheckSignature) -> Accusation:
    return open_proof(decode_proof(encoded), check)


def _remember(known: dict[_Key, None], key: _Key) -> None:
    known[key] = None
    if len(known) > MAX_REMEMBERED:
        del known[next(iter(known))]
