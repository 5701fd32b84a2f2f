"""Evidence store: tensors kept for a while by content address, and the protocol that serves them.

Whoever knows a digest may have the bytes: the digests of a session are known to its client and its hops, and
to those whom one of them tells. The asker hashes what comes before anything else sees it. Request and answer
are each one MessagePack value behind a big-endian u32 length; the contents follow the answer. A digest is 32
bytes and its content megabytes, so answers are limited (`Answers`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Final

import msgspec
import trio

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.concurrency.rate_limit import RateLimit
from p2pinfer.node.host.answers import Allowance, AnswerLimits, Answers
from p2pinfer.node.host.network import Network
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.reputation.receipt import Payload, digest_of

EVIDENCE_PROTOCOL: Final = "/p2pinfer/evidence/1.0.0"
MAX_DIGESTS: Final = 256  # asked for at once
MAX_CONTENT_BYTES: Final = 1 << 25  # of one answer
ASKS_PER_S: Final = 4.0  # of one peer
ASKS_AT_ONCE: Final = 64
# An audit asks for 32 MB at most (audit.evidence_bytes), most of them for less than one; a proof is as large.
LIMITS: Final = AnswerLimits(
    peer=Allowance(turns=4, burst_bytes=2 * MAX_CONTENT_BYTES, bytes_per_s=2 << 20),
    address_range=Allowance(turns=8, burst_bytes=4 * MAX_CONTENT_BYTES, bytes_per_s=4 << 20),
    everybody=Allowance(turns=32, burst_bytes=4 * MAX_CONTENT_BYTES, bytes_per_s=8 << 20),
)
ANSWER_S: Final = 8.0  # all contents are due after so long, and the time that their bytes take
LEAST_BYTES_PER_S: Final = 65_536  # half a megabit a second: a slow line upwards, shared by two
PATIENCE_S: Final = 30.0  # for one answer, where nobody's standing depends on it
_MAX_REQUEST_BYTES: Final = 16_384
_MAX_ANSWER_BYTES: Final = 4_096
_HASH_INLINE_BYTES: Final = 1 << 16
_MAX_ASKING: Final = 16  # peers at once of whom it is noted how much of a watched group they have

_Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class _Ask(msgspec.Struct, frozen=True, array_like=True):
    digests: Annotated[tuple[_Digest, ...], msgspec.Meta(min_length=1, max_length=MAX_DIGESTS)]


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    sizes: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_CONTENT_BYTES)] | None, ...],
        msgspec.Meta(max_length=MAX_DIGESTS),
    ]


_encoder: Final = msgspec.msgpack.Encoder()
_asks: Final = msgspec.msgpack.Decoder(_Ask)
_answers: Final = msgspec.msgpack.Decoder(_Answer)


@dataclass(slots=True)
class _Group:
    touched_at: float
    contents: dict[bytes, Payload] = field(default_factory=dict[bytes, Payload])
    size: int = 0
    is_full: bool = False  # nothing more is added to it
    unsent: dict[str, set[bytes]] = field(default_factory=dict[str, set[bytes]])  # by who asked for some


class EvidenceStore:
    """Contents by digest, in groups that come and go as one: the session, or the proof, that they belong to.

    The group that was touched longest ago goes first when there is no room, and any that was not touched for
    `keep_s`.
    """

    def __init__(self, max_bytes: int, keep_s: float, *, groups_at_least: int = 4) -> None:
        """A store of `max_bytes`, none of whose groups takes more than one of so many equal shares."""
        self.held_bytes = 0
        self._max_bytes = max_bytes
        self._groups_at_least = groups_at_least
        self._keep_s = keep_s
        self._groups: OrderedDict[bytes, _Group] = OrderedDict()
        self._groups_of: dict[bytes, list[bytes]] = {}  # digest -> the groups that hold it, oldest first
        self._watched: dict[bytes, trio.Event] = {}
        self._pinned: dict[bytes, Payload] = {}  # what stays, outside of all limits

    def pin(self, contents: Mapping[bytes, Payload]) -> None:
        """Keep contents by digest, in place of those that were pinned before, until there are others."""
        self._pinned = dict(contents)

    def add(self, group: bytes, contents: Iterable[tuple[bytes, Payload]], now: float) -> None:
        """Keep (digest, content) pairs; of a group that outgrows its share, the first ones that fit.

        A session's beginning is of use without its end, and its end is not without its beginning.
        """
        self.forget_expired(now)
        held = self._groups.get(group)
        if held is None:
            held = self._groups[group] = _Group(now)
        self._groups.move_to_end(group)
        held.touched_at = now
        # What is kept has to be an unbroken beginning, since an audit runs the steps from the first one on.
        # So a group that is full stays so, though a later and smaller content would fit. Making room by
        # dropping its oldest ones, as a cache would, would leave an end that proves nothing.
        for digest, content in contents:
            if held.is_full or digest in held.contents:
                continue
            if held.size + len(content) > self._max_bytes // self._groups_at_least:
                # A share, not all there is: one long session would otherwise push out what all others may be
                # asked for.
                held.is_full = True
                continue
            held.contents[digest] = content
            held.size += len(content)
            self.held_bytes += len(content)
            # All groups, and not the last alone: any of them may be the next to be dropped, since to touch a
            # group makes it younger than those that added the same content after it.
            self._groups_of.setdefault(digest, []).append(group)
        # Never this group: it was touched last, and has no more than a share.
        while self.held_bytes > self._max_bytes:
            self._drop_oldest()

    def get(self, digest: bytes, now: float) -> Payload | None:
        """Content with this digest, if it is held."""
        self.forget_expired(now)
        if digest in self._pinned:
            return self._pinned[digest]
        groups = self._groups_of.get(digest)
        return None if groups is None else self._groups[groups[-1]].contents[digest]

    def watch(self, group: bytes) -> trio.Event:
        """Set as soon as one peer has been given all of a group."""
        return self._watched.setdefault(group, trio.Event())

    def note_sent(self, peer_id: str, digests: Iterable[bytes]) -> None:
        """`peer_id` was given these contents."""
        for digest in digests:
            for group in self._groups_of.get(digest, ()):
                if group in self._watched:
                    self._note_sent_of(group, peer_id, digest)

    def _note_sent_of(self, group: bytes, peer_id: str, digest: bytes) -> None:
        held = self._groups[group]
        # Bounded, for a stranger has as many identities as it likes.
        if len(held.unsent) < _MAX_ASKING or peer_id in held.unsent:
            unsent = held.unsent.setdefault(peer_id, {*held.contents})
            unsent.discard(digest)
            if not unsent:
                held.unsent.clear()
                self._watched.pop(group).set()

    def forget_expired(self, now: float) -> None:
        """Drop what was not touched for too long."""
        while self._groups and next(iter(self._groups.values())).touched_at + self._keep_s < now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        group, held = self._groups.popitem(last=False)
        self._watched.pop(group, None)
        for digest in held.contents:
            groups = self._groups_of[digest]
            groups.remove(group)
            if not groups:
                del self._groups_of[digest]
        self.held_bytes -= held.size


def due_s(content_bytes: int) -> float:
    """Seconds after which a peer is late with so many bytes of evidence, whatever it has sent of them.

    A peer that answers is not late if its line carries `LEAST_BYTES_PER_S`. One that trickles pieces would
    otherwise outlive every audit.
    """
    return ANSWER_S + content_bytes / LEAST_BYTES_PER_S


def serve_evidence(
    host: Network, *stores: EvidenceStore, clock: Callable[[], float] = trio.current_time
) -> None:
    """Answer whoever asks for what the `stores` hold, from now on."""
    asks = RateLimit(ASKS_PER_S, ASKS_AT_ONCE)
    answers = Answers(LIMITS)

    async def answer(stream: PeerStream) -> None:
        if not asks.take(stream.peer_id, clock()):
            raise ProtocolViolation("asks for evidence too often", stream.peer_id)
        host.counts.add("audits", "asked")
        with answers.turn(stream) as answer, trio.move_on_after(ANSWER_S) as limit:
            digests = decode_ask(await _receive_value(stream, bytearray(), _MAX_REQUEST_BYTES))
            sizes = tuple(
                None if content is None else len(content)
                for content in contents_for(stores, digests, clock())
            )
            # As long as an asker waits: there is nobody to send to after that.
            limit.deadline += due_s(sum(size or 0 for size in sizes))
            head = _encoder.encode(_Answer(sizes))
            head = len(head).to_bytes(4, "big") + head
            asked = [(digest, size) for digest, size in zip(digests, sizes, strict=False) if size]
            total = sum(size for _, size in asked)
            await answer.send(len(head) + total, chain([head], contents(asked)))
            # After the last byte: a peer that hung up half-way has not been given them.
            for store in stores:
                store.note_sent(stream.peer_id, digests[: len(sizes)])

    def contents(asked: Sequence[tuple[bytes, int]]) -> Iterator[Payload]:
        """One after the other: what the store has dropped meanwhile must not be held for a slow reader."""
        for digest, size in asked:
            content = _find(stores, digest, clock())
            if content is None or len(content) != size:
                raise PeerVanished("took so long that its evidence is not kept any more")
            yield content

    host.serve(EVIDENCE_PROTOCOL, answer)


async def fetch_evidence(
    host: Network,
    peer_id: str,
    digests: Sequence[bytes],
    addrs: Sequence[str] = (),
    *,
    max_bytes: int = MAX_CONTENT_BYTES,
    within_s: float = PATIENCE_S,
    hearsay: bool = True,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> dict[bytes, bytes]:
    """Contents of `digests` that `peer_id` holds, each checked against its digest.

    Args:
        digests: At most `MAX_DIGESTS`.
        max_bytes: What all contents may take together; an answer that is larger is not read.
        within_s: How long the answer may take, dialling included.
        hearsay: False where the addresses are the peer's own word, as those of a route's hops are.
        on_bytes: Told of every piece that arrives, in bytes.

    Raises:
        PeerError: The peer cannot be reached, does not answer in time, or answers something else.
    """
    ask = _encoder.encode(_Ask(tuple(digests)))
    try:
        with trio.fail_after(within_s):
            async with aclosing(
                await host.open_stream(peer_id, EVIDENCE_PROTOCOL, addrs, hearsay=hearsay)
            ) as stream:
                await stream.send_all(len(ask).to_bytes(4, "big") + ask)
                buffer = bytearray()
                sizes = decode_answer(await _receive_value(stream, buffer, _MAX_ANSWER_BYTES))
                total = sum(size or 0 for size in sizes)
                # Before a byte of them is read, or a peer could have us hold as much as it likes.
                if total > min(max_bytes, MAX_CONTENT_BYTES) or len(sizes) > len(digests):
                    raise ProtocolViolation(f"evidence of {total} bytes; {max_bytes} were asked for")
                while len(buffer) < total:
                    received = await _receive_some(stream)
                    on_bytes(len(received))
                    buffer += received
    except trio.TooSlowError as exc:
        raise PeerVanished(f"no evidence in {within_s:g} s", peer_id) from exc
    except ProtocolViolation as exc:
        exc.peer_id = peer_id
        raise
    return await _checked(digests, sizes, buffer, peer_id)


def contents_for(
    stores: Sequence[EvidenceStore], digests: Sequence[bytes], now: float
) -> list[Payload | None]:
    """Held contents of `digests`, in their order, as far as they fit one answer."""
    contents: list[Payload | None] = []
    left = MAX_CONTENT_BYTES
    for digest in digests:
        content = _find(stores, digest, now)
        left -= len(content or b"")
        # A prefix, since sizes go by position. The asker asks again for the rest.
        if left < 0:
            break
        contents.append(content)
    return contents


def _find(stores: Sequence[EvidenceStore], digest: bytes, now: float) -> Payload | None:
    found = (store.get(digest, now) for store in stores)
    return next((each for each in found if each is not None), None)


def decode_ask(encoded: bytes) -> tuple[bytes, ...]:
    """Raises ProtocolViolation for anything that is no request."""
    try:
        return _asks.decode(encoded).digests
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("malformed request for evidence") from exc


def decode_answer(encoded: bytes) -> tuple[int | None, ...]:
    """Raises ProtocolViolation for anything that is no answer."""
    try:
        return _answers.decode(encoded).sizes
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation("malformed answer about evidence") from exc


async def _checked(
    digests: Sequence[bytes], sizes: Sequence[int | None], buffer: bytearray, peer_id: str
) -> dict[bytes, bytes]:
    """The contents in `buffer`, by digest. Copying and hashing more than a little is done in a thread."""

    def taken() -> dict[bytes, bytes] | None:
        contents: dict[bytes, bytes] = {}
        offset = 0
        with memoryview(buffer) as view:
            for digest, size in zip(digests, sizes, strict=False):
                if size is not None:
                    # A copy: a view would keep the whole answer in memory for as long as one part of it is
                    # held.
                    contents[digest] = bytes(view[offset : offset + size])
                    offset += size
                    if digest_of(contents[digest]) != digest:
                        return None
        return contents

    small = len(buffer) <= _HASH_INLINE_BYTES
    contents = taken() if small else await trio.to_thread.run_sync(taken)
    if contents is None:
        raise ProtocolViolation("evidence that is not what was asked for", peer_id)
    return contents


async def _receive_value(stream: trio.abc.ReceiveStream, buffer: bytearray, limit: int) -> bytes:
    """The bytes of the next value; what came after them stays in `buffer`."""
    while len(buffer) < 4:
        buffer += await _receive_some(stream)
    size = int.from_bytes(buffer[:4], "big")
    if size > limit:
        raise ProtocolViolation(f"a message of {size} bytes; {limit} are allowed")
    while len(buffer) < 4 + size:
        buffer += await _receive_some(stream)
    value = bytes(buffer[4 : 4 + size])
    del buffer[: 4 + size]
    return value


async def _receive_some(stream: trio.abc.ReceiveStream) -> bytes | bytearray:
    received = await stream.receive_some(1 << 18)
    if not received:
        raise PeerVanished("the stream ended in the middle of evidence")
    return received
