"""Gossip of fraud proofs: notices by content address, then fetched, checked and passed on.

Who has a proof gossips a notice: the proof's digest, whom it is about, and who holds it. Whoever hears of it
fetches proof and tensors from the author, or from a neighbour who was faster, looks whether signatures and
digests hold, and keeps all of it for others. So a client that only dials can publish, and leave. Who comes
later is told with a neighbour's table. Nobody is believed: what a proof says of the arithmetic is for
`on_proof` to see, by running the blocks again.

    notice (gossip, snapshot) -> queue, bounded -> fetch, bounded -> signatures -> store -> on_proof

An author whose proof turns out to be false, or another than its notice says, is not listened to any more; of
a proof that others tell of too, their notices are followed (`node/evidence/proof_errands.py`). Authors cost
nothing, so what counts against a flood are the bounds. A neighbour may pass on so many notices, before a
signature is looked at, and has its own places in the queue. A notice says how large its proof is, and how
many tokens and blocks it takes to run it again; what comes is held to it. So the bytes of an author, and of
all of them, are bounded before they are fetched, and what examining takes before it is paid. Proofs about
peers that nobody here has heard of take a small part of the store, so keys that were made up for them push
out nothing else, and are not examined before such a peer announces itself: until then nobody can use it, and
nobody needs to know.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Protocol

import msgspec
import trio

from p2pinfer.errors import PeerError, ProtocolViolation
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.evidence.proof_errands import Errand, Errands
from p2pinfer.node.evidence.store import EvidenceStore
from p2pinfer.node.host.network import Network
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

from .live_table import LiveTable
from .proof_fetch import Holders, fetch_parts

logger = logging.getLogger(__name__)

MAX_NOTICE_BYTES: Final = 4096
MAX_TENSOR_BYTES: Final = 1 << 25  # of one proof
MAX_REMEMBERED: Final = 4096  # authors
MAX_TOLD: Final = 64  # notices that a newcomer is told of
MAX_TOLD_OF_UNKNOWN: Final = 8  # about peers that nobody here has heard of
FETCHED_AT_ONCE: Final = 4  # one that nobody has must not hold up the others
UNKNOWNS_PART: Final = 8  # proofs about peers that were never announced here have this part of the memory
ARRIVALS_EVERY_S: Final = 0.5  # at most so often it is seen who has announced itself
MAX_BYTES: Final = (
    MAX_PROOF_BYTES + MAX_TENSOR_BYTES
)  # of one proof, and what a notice counts as that says none
# A hundred proofs of two megabytes an hour; of one author one of the largest, and then a small one a minute.
BYTES_PER_S: Final = 1 << 16
BYTES_AT_ONCE: Final = 4 * MAX_BYTES
AUTHORS_BYTES_PER_S: Final = 1 << 12


class Notice(msgspec.Struct, frozen=True, array_like=True):
    """News of a proof. Travels as the payload of a sealed record, whose author holds the proof.

    Attributes:
        size: Bytes of the proof and of the tensors that it names.
        tokens: Rows of all inputs, with those that were rolled back.
        blocks: Blocks of the span. All three are 0 in notices of earlier versions, and say nothing then.
    """

    kind: Literal["proof"]
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    proof: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    accused: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    addrs: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=256)], ...], msgspec.Meta(max_length=16)
    ] = ()
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)] = 0
    tokens: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0
    blocks: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] = 0


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
    """Fetches the proofs it hears of, keeps them for others, and shows them to `on_proof`.

    Args:
        is_known: Whether a peer has been heard of in the swarm. Of others anybody can make as many as it
            likes, and proofs about them are kept apart, in `aside`.
        aside: Where those are kept; None: where all are.
        news: Gives the event of the next announcement, after which peers may be known that were not.
    """

    def __init__(
        self,
        host: Network,
        store: EvidenceStore,
        board: NoticeBoard,
        *,
        is_known: Callable[[str], bool] = lambda _: True,
        aside: EvidenceStore | None = None,
        news: Callable[[], trio.Event] = trio.Event,
    ) -> None:
        self.store = store
        self._on_proof: OnProof | None = None
        self._is_wanted: Callable[[Heard], bool] = lambda _: True
        self._host = host
        self._board = board
        self._is_known = is_known
        self._news = news
        self._errands = Errands[Heard]()
        self._liars = Recent[str, None](MAX_REMEMBERED)
        self._handing_out: dict[bytes, trio.Event] = {}  # proofs of ours
        # Where proofs are kept, and by proof that is here: the notice, since when.
        self._shelf = _Shelf(store, MAX_TOLD)
        self._aside = _Shelf(store if aside is None else aside, MAX_TOLD_OF_UNKNOWN)
        self._bytes = RateLimit(BYTES_PER_S, BYTES_AT_ONCE, max_remembered=1)
        self._authors_bytes = RateLimit(AUTHORS_BYTES_PER_S, MAX_BYTES)

    @property
    def stores(self) -> tuple[EvidenceStore, ...]:
        """Stores of the proofs that others may ask for."""
        return tuple(dict.fromkeys((self._shelf.store, self._aside.store)))

    def attach(self, on_proof: OnProof, is_wanted: Callable[[Heard], bool]) -> None:
        """Let somebody look at proofs, those included that have come already.

        Args:
            on_proof: True: it proves what it says. False: it does not. None: that cannot be told.
            is_wanted: Whether a proof is worth fetching and looking at.
        """
        self._on_proof, self._is_wanted = on_proof, is_wanted
        for shelf in (self._shelf, self._aside):
            for number, (heard, _) in enumerate(list(shelf.held.values())):
                if is_wanted(heard):
                    here = Errand(heard, heard.notice.proof, heard.author, f"here {number}", is_paid=True)
                    self._errands.look_again(here)

    def hear(self, heard: Heard) -> bool:
        """Take in a notice; whether others should get it."""
        proof, author = heard.notice.proof, heard.author
        if (
            author in self._liars
            or not self._errands.has_use_for(proof, author)
            or not self._is_wanted(heard)
        ):
            return False
        if not self._errands.put(Errand(heard, proof, author, heard.told_by or author)):
            logger.debug("proof.too_many author=%s told_by=%s", heard.author, heard.told_by)
            return False
        return True

    async def publish(self, proof: Proof, contents: Mapping[bytes, Payload]) -> bytes:
        """Hold a proof of ours for the swarm and tell of it; returns its content address."""
        encoded, address, accusation = await trio.to_thread.run_sync(_prepare, proof, self._host.verify)
        self._errands.remember(address)
        self._shelf.keep(address, encoded, contents)
        self._handing_out[address] = self.store.watch(address)
        notice = Notice(
            "proof",
            accusation.revision,
            address,
            proof.peer_id,
            self._host.addrs[:16],
            min(MAX_BYTES, len(encoded) + sum(map(len, contents.values()))),
            *accusation.extent,
        )
        self._shelf.note(Heard(notice, self._host.peer_id, await self._board.publish_notice(notice)))
        return address

    async def handed_out(self, address: bytes) -> None:
        """Wait until somebody else has all of a proof that was published here."""
        if (event := self._handing_out.get(address)) is not None:
            await event.wait()
            self._handing_out.pop(address, None)

    def records(self, revision: str | None = None) -> list[tuple[bytes, float]]:
        """Sealed notices of the proofs that are here, with their ages in seconds, youngest first."""
        return [*self._shelf.records(revision), *self._aside.records(revision)]

    async def serve(self) -> None:
        """Fetch and check what was heard of, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_arrivals)
            for _ in range(FETCHED_AT_ONCE):
                nursery.start_soon(self._follow_all, nursery)

    async def _watch_arrivals(self) -> None:
        """Take up what was put aside once its peer has announced itself."""
        while True:
            news = self._news()
            for proof, (heard, _) in list(self._aside.held.items()):
                if self._is_known(heard.notice.accused):
                    del self._aside.held[proof]
                    self._errands.look_again(Errand(heard, proof, heard.author, "aside", is_paid=True))
            await news.wait()
            await trio.sleep(ARRIVALS_EVERY_S)

    async def _follow_all(self, nursery: trio.Nursery) -> None:
        errands = self._errands
        while True:
            errand = await errands.get()
            heard = errand.notice
            try:
                with self._paid(errand) as note_bytes:
                    await self._follow(heard, note_bytes)
            except _Misdescribed as exc:
                logger.info("rejected a notice of a fraud proof published by %s: %s", heard.author, exc)
                self._liars[heard.author] = None
                errands.note_in_vain(errand, nursery, again=False)
            except ProtocolViolation as exc:
                logger.info("rejected a fraud proof published by %s: %s", heard.author, exc)
                self._liars[heard.author] = None
                errands.done(errand)
            except PeerError as exc:
                logger.debug("proof.unavailable proof=%s why=%s", errand.proof.hex(), exc)
                errands.note_in_vain(errand, nursery, again=True)
            else:
                errands.done(errand)

    async def _follow(self, heard: Heard, on_bytes: Callable[[int], None]) -> None:
        notice = heard.notice
        most = notice.size or MAX_BYTES
        stores = self._shelf.store, self._aside.store
        holders = Holders(heard.told_by, heard.author, notice.accused, notice.addrs)
        at_most = min(most, MAX_PROOF_BYTES)
        found = await fetch_parts(self._host, stores, holders, [notice.proof], at_most, on_bytes)
        encoded = found[notice.proof]
        accusation = await trio.to_thread.run_sync(_open, encoded, self._host.verify)
        if (accusation.peer_id, accusation.revision) != (notice.accused, notice.revision):
            raise _Misdescribed("a proof about somebody else than its notice says")
        if notice.size and accusation.extent != (notice.tokens, notice.blocks):
            raise _Misdescribed("a proof that takes more to check than its notice says")
        at_most = min(most - len(encoded), MAX_TENSOR_BYTES)
        contents = await fetch_parts(self._host, stores, holders, accusation.contents, at_most, on_bytes)
        shelf = self._shelf if self._is_known(notice.accused) else self._aside
        shelf.keep(notice.proof, encoded, contents)
        shelf.note(heard)
        if shelf is self._aside:
            return
        if self._on_proof is not None and await self._on_proof(heard, accusation, contents) is False:
            shelf.held.pop(notice.proof, None)
            raise ProtocolViolation(f"the outputs of {notice.accused} are correct")

    @contextmanager
    def _paid(self, errand: Errand[Heard]) -> Generator[Callable[[int], None]]:
        """Take a proof's bytes from what its author, and all of them, may have fetched; some are not needed.

        Raises:
            PeerError: There are not so many left.
        """
        author, now, came = errand.author, trio.current_time(), 0
        size = 0 if errand.is_paid else errand.notice.notice.size or MAX_BYTES

        def note(received: int) -> None:
            nonlocal came
            came += received

        if self._bytes.left("", now) < size or not self._authors_bytes.take(author, now, size):
            raise PeerError("too many bytes of proofs at the moment", author)
        self._bytes.take("", now, size)
        try:
            yield note
        finally:  # a notice of nothing would else cost as much as it says
            self._bytes.give_back("", max(0, size - came))
            self._authors_bytes.give_back(author, max(0, size - came))


def new_carrier(host: Network, board: NoticeBoard, config: ServeConfig, view: LiveTable) -> ProofCarrier:
    """A carrier with as much memory as the settings grant; `view` says who has been heard of."""
    return ProofCarrier(
        host,
        EvidenceStore(config.proof_bytes, config.proof_keep_s, groups_at_least=2),
        board,
        is_known=lambda peer_id: bool(view.records_of(peer_id)),
        aside=EvidenceStore(config.proof_bytes // UNKNOWNS_PART, config.proof_keep_s, groups_at_least=1),
        news=lambda: view.changed,
    )


class _Misdescribed(ProtocolViolation):
    """A notice says of a proof what is not so. Of the proof itself that says nothing."""


class _Shelf:
    """Proofs that are here, and the notices that newcomers are told of."""

    def __init__(self, store: EvidenceStore, max_told: int) -> None:
        self.store = store
        self.held = Recent[bytes, tuple[Heard, float]](max_told)  # by proof: its notice, since when

    def keep(self, address: bytes, encoded: bytes, contents: Mapping[bytes, Payload]) -> None:
        self.store.add(address, [(address, encoded), *contents.items()], trio.current_time())

    def note(self, heard: Heard) -> None:
        self.held[heard.notice.proof] = heard, trio.current_time()

    def records(self, revision: str | None) -> list[tuple[bytes, float]]:
        now = trio.current_time()
        for proof in [proof for proof in self.held if self.store.get(proof, now) is None]:
            del self.held[proof]
        return [
            (heard.record, now - since)
            for heard, since in reversed(list(self.held.values()))
            if revision in (None, heard.notice.revision)
        ]


def _prepare(proof: Proof, check: CheckSignature) -> tuple[bytes, bytes, Accusation]:
    """The proof as it travels, its content address, and what it says."""
    encoded = encode_proof(proof)
    return encoded, digest_of(encoded), open_proof(proof, check)


def _open(encoded: bytes, check: CheckSignature) -> Accusation:
    return open_proof(decode_proof(encoded), check)
