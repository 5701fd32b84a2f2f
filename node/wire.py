"""The messages of a session, and the frames they travel in.

A frame is two big-endian u32 lengths, a msgpack header of the first length and a payload of the second.
The header is one message of this module, an array whose first element names it; the payload is a tensor's
bytes (see `tensors`), empty for every message but `Step` and `Result`. A stream ends with `End`: libp2p
shows a reset and an orderly close alike to a reader, so without the marker a cut stream would pass for a
finished one.

What a peer sends is checked here before anything else sees it: lengths before memory is taken, every
field's type and range before a message exists. Whatever fails is a `ProtocolViolation`.
"""

from __future__ import annotations

import math
import struct
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias, get_args

import msgspec
import trio
import trio.abc

from p2pinfer.errors import PeerVanished, ProtocolViolation

SESSION_PROTOCOL: Final = "/p2pinfer/session/1.0.0"  # client and hop: a session, its steps, its results
CHAIN_PROTOCOL: Final = "/p2pinfer/chain/1.0.0"  # hop -> its successor: carries steps

MAX_HEADER_BYTES: Final = 1 << 16
READ_BYTES: Final = 1 << 18
_LENGTHS: Final = struct.Struct(">II")

RefusalCode: TypeAlias = Literal[
    "cache_full",  # no room for the session's KV cache or replay log
    "wrong_model",  # another revision is served here
    "wrong_span",  # these blocks are not held here
    "busy",  # too many sessions, of this client or of all
    "over_share",  # this client holds as much of the cache or the replay log as one may
    "leaving",  # the node is shutting down
    "no_session",  # the session to attach to is not known, or not yours
    "successor_unreachable",  # the next hop could not be dialled, or did not let us attach
    "successor_vanished",  # the next hop is gone in the middle of the session
    "no_replay",  # the replay log does not reach back as far as was asked
    "lease_expired",  # the session was idle too long
    "wrong_input",  # a tensor came in that is not finite
    "protocol",  # a frame that the protocol does not allow
    "compute",  # the span could not be computed
]

SessionId: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
PeerIdText: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
# Strangers' words end up on terminals: no control characters.
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z")]
Block: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Codec: TypeAlias = Literal["float32", "bfloat16", "float16"]
CODECS: Final[tuple[Codec, ...]] = get_args(Codec)


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Positional on the wire; fields that a later minor version appends are skipped by an older reader."""


class Successor(msgspec.Struct, frozen=True, array_like=True):
    """Where a hop sends its output: a peer and the addresses it is said to answer at."""

    peer_id: PeerIdText
    addrs: Annotated[tuple[Text, ...], msgspec.Meta(max_length=16)] = ()


class Open(_Message, frozen=True, tag="open"):
    """Client to every hop, first on a session stream: reserve a session on `[start, stop)`.

    `predecessor` names the only peer whose chain stream may feed this session; None is the client itself,
    on this stream. `successor` None means: answer to the client, on this stream.
    """

    session: SessionId
    revision: Annotated[str, msgspec.Meta(max_length=64)]
    start: Block
    stop: Block
    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 24)]
    codec: Codec
    predecessor: PeerIdText | None = None
    successor: Successor | None = None


class Opened(_Message, frozen=True, tag="opened"):
    """Hop to client: cache reserved, successor attached; steps may come, within these limits."""

    dtype: Annotated[str, msgspec.Meta(max_length=16)]  # what the hop computes in
    max_chunk_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)] = 1024  # tokens in one step
    max_steps_in_flight: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)] = 16  # steps without a result
    max_bytes_in_flight: Annotated[int, msgspec.Meta(ge=1, le=1 << 62)] = 64 << 20  # of their hidden states


class Move(_Message, frozen=True, tag="move"):
    """Client to hop, first on a session stream: a session of mine goes on here instead of where it began.

    Sent while none of its steps is under way. The hop answers `Moved` and says `End` on the former stream.
    """

    session: SessionId


class Moved(_Message, frozen=True, tag="moved"):
    """Hop to client: go on."""


class Attach(_Message, frozen=True, tag="attach"):
    """Predecessor to hop, first on a chain stream: what follows belongs to this session."""

    session: SessionId


class Attached(_Message, frozen=True, tag="attached"):
    """Hop to predecessor: go on."""


class Bill(msgspec.Struct, frozen=True, array_like=True):
    """What one hop spent on one step, in microseconds, and how many tokens shared its batch."""

    queue_us: Count
    compute_us: Count
    serve_us: Count  # from the frame's arrival to the moment its output was ready to send, all included
    batch_tokens: Count


Bills: TypeAlias = Annotated[tuple[Bill, ...], msgspec.Meta(max_length=256)]
Receipts: TypeAlias = Annotated[
    tuple[Annotated[bytes, msgspec.Meta(max_length=1024)], ...], msgspec.Meta(max_length=256)
]


class Step(_Message, frozen=True, tag="step"):
    """To a hop: `tokens` hidden states for positions `position`, `position + 1`, ...

    A position below the cache's length rolls the cache back to it. A step of a higher `epoch` supersedes the
    queued steps of lower ones that begin at or after its position: they are dropped unread.

    With `replay` it only fills caches and replay logs, of as many hops, the receiver being the first: nobody
    answers it with a `Result`, but the last of them says `Filled`.
    """

    number: Count
    epoch: Count
    position: Count
    tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]
    returns: Count  # how many of the last positions the client wants back from the last hop
    bills: Bills = ()
    receipts: Receipts = ()
    replay: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0


class Filled(_Message, frozen=True, tag="filled"):
    """Hop to whoever fed it: a step with `replay` is in the caches of all hops it was meant for."""

    number: Count


class Result(_Message, frozen=True, tag="result"):
    """Last hop to client: the hidden states of a step's last `tokens` positions, after every block."""

    number: Count
    epoch: Count
    tokens: Count
    bills: Bills = ()
    receipts: Receipts = ()


class Refused(_Message, frozen=True, tag="refused"):
    """Instead of `Opened` or `Attached`, or in the middle of a session that cannot go on."""

    code: RefusalCode
    message: Text
    peer_id: Annotated[str, msgspec.Meta(max_length=128)] = ""  # the peer it is about, if another one


class Expect(_Message, frozen=True, tag="expect"):
    """Client to hop: let this peer attach as well. With its first step of its own, others are cut off."""

    predecessor: PeerIdText


class Relink(_Message, frozen=True, tag="relink"):
    """Client to hop: stand ready to send to `successor`, and send it positions `[start, stop)` of the log.

    They go as steps of `epoch` with `replay`, of at most `chunk_tokens` each, no more than `window` of them
    not `Filled` yet; a link to that peer is made unless there is one. With `switch` the link then takes the
    place of the former one, and steps of lower epochs are not sent on any more.
    """

    number: Count
    successor: Successor
    start: Count
    stop: Count
    replay: Annotated[int, msgspec.Meta(ge=1, le=256)]
    epoch: Count
    switch: bool
    chunk_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)] = 256
    window: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8


class Relinked(_Message, frozen=True, tag="relinked"):
    """Hop to client: done, or the reason why not.

    Without `switch` everything replayed has been `Filled`; with it, everything has been sent.
    """

    number: Count
    problem: RefusalCode | None = None


class Probe(_Message, frozen=True, tag="probe"):
    """Client to hop, and hop to successor: are you there? The event loop answers, whatever is computed.

    A hop that is asked by its client asks its successor in turn, and waits `within_ms` for the answer.
    """

    number: Count
    within_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)] = 0


class Alive(_Message, frozen=True, tag="alive"):
    """The answer to `Probe`, and whether the hop's successor answers; None where there is none to ask."""

    number: Count
    successor: bool | None = None


class Leaving(_Message, frozen=True, tag="leaving"):
    """Hop to client: this node stops in so many seconds; have another one take over."""

    seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)]


class End(_Message, frozen=True, tag="end"):
    """Nothing follows on this stream."""


Message: TypeAlias = (
    Open
    | Opened
    | Move
    | Moved
    | Attach
    | Attached
    | Step
    | Filled
    | Result
    | Refused
    | Expect
    | Relink
    | Relinked
    | Probe
    | Alive
    | Leaving
    | End
)

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Message]] = msgspec.msgpack.Decoder(Message)


def encode_header(message: Message, payload_bytes: int) -> bytes:
    """Everything of a frame that precedes its payload."""
    header = _encoder.encode(message)
    return _LENGTHS.pack(len(header), payload_bytes) + header


def decode_message(header: bytes | bytearray | memoryview) -> Message:
    """The message in a frame's header.

    Raises:
        ProtocolViolation: The bytes are no message, or a field is out of its range.
    """
    try:
        return _decoder.decode(header)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise ProtocolViolation("not a message of this protocol") from exc  # exc may quote the peer


def printable(text: str) -> str:
    """`text` as a message may carry it: one line, no control characters, not too long."""
    return "".join(each if each.isprintable() else " " for each in text)[:1024]


@dataclass(frozen=True, slots=True)
class Pace:
    """The slowest that a peer may send or take in a frame that has begun."""

    grace_s: float
    bytes_per_s: float

    def limit_s(self, frame_bytes: int) -> float:
        """How long a frame of so many bytes may take."""
        return self.grace_s + frame_bytes / self.bytes_per_s


class FrameStream:
    """Frames over a byte stream. One task may receive; any number may send, one whole frame at a time.

    With a `pace`, a peer that sends or reads more slowly is cut off. How long it pauses between frames is for
    others to judge.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        max_payload_bytes: int,
        peer_id: str = "",
        pace: Pace | None = None,
    ) -> None:
        self.peer_id = peer_id
        self._pace = pace
        self.max_payload_bytes = max_payload_bytes
        self._stream = stream
        self._send_lock = trio.StrictFIFOLock()
        self._buffer = bytearray()
        self._ended = False

    async def send(self, message: Message, payload: bytes | bytearray | memoryview = b"") -> None:
        """Send one frame.

        Raises:
            PeerVanished: The stream is gone, or the peer does not keep the pace. A cancelled send leaves half
                a frame: close the stream then.
        """
        frame = encode_header(message, len(payload))
        limit_s = self._pace.limit_s(len(frame) + len(payload)) if self._pace else math.inf
        async with self._send_lock:
            try:
                with trio.fail_after(limit_s) if limit_s < math.inf else nullcontext():
                    await self._stream.send_all(b"".join((frame, payload)) if payload else frame)
            except trio.TooSlowError as exc:
                await trio.aclose_forcefully(self._stream)
                raise PeerVanished(f"took no frame in within {limit_s:.0f} s", self.peer_id) from exc
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise PeerVanished("the stream ended while sending", self.peer_id) from exc

    async def receive(self) -> tuple[Message, bytearray]:
        """The next message and its payload, which the caller owns.

        Raises:
            PeerVanished: The stream broke, or ended without `End`.
            ProtocolViolation: What came is no frame of this protocol, is too large, or comes too slowly.
        """
        if not self._buffer:
            await self._fill(1)
        else:  # a quarter of a megabyte of small frames may have come at once, and others want their turn
            await trio.lowlevel.checkpoint()
        began_at = trio.current_time()
        await self._fill(_LENGTHS.size, self._deadline(began_at, _LENGTHS.size))
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._buffer)
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > self.max_payload_bytes:
            raise ProtocolViolation(
                f"a frame of {header_bytes} + {payload_bytes} bytes; "
                f"at most {MAX_HEADER_BYTES} + {self.max_payload_bytes} are allowed here",
                self.peer_id,
            )
        head = _LENGTHS.size + header_bytes
        deadline = self._deadline(began_at, head + payload_bytes)
        await self._fill(head, deadline)
        try:
            message = decode_message(self._buffer[_LENGTHS.size : head])
        except ProtocolViolation as exc:
            exc.peer_id = self.peer_id
            raise
        if payload_bytes and not isinstance(message, Step | Result):
            raise ProtocolViolation(f"a {type(message).__name__} with a payload", self.peer_id)
        await self._fill(head + payload_bytes, deadline)
        payload = self._buffer[head : head + payload_bytes]
        del self._buffer[: head + payload_bytes]
        return message, payload

    def _deadline(self, began_at: float, frame_bytes: int) -> float:
        return began_at + self._pace.limit_s(frame_bytes) if self._pace else math.inf

    async def _fill(self, size: int, deadline: float = math.inf) -> None:
        """Read until the buffer holds `size` bytes. It grows only by what has really arrived."""
        while len(self._buffer) < size:
            try:
                with trio.fail_at(deadline) if deadline < math.inf else nullcontext():
                    received = await self._stream.receive_some(READ_BYTES)
            except trio.TooSlowError as exc:
                raise ProtocolViolation("a frame that comes too slowly", self.peer_id) from exc
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise PeerVanished("the stream broke", self.peer_id) from exc
            if not received:
                what = "in the middle of a frame" if self._buffer else "without its end marker"
                raise PeerVanished(f"the stream ended {what}", self.peer_id)
            self._buffer += received

    async def end(self) -> None:
        """Say that nothing follows and close; quiet when the peer is already gone."""
        if self._ended:
            return
        self._ended = True
        try:
            await self.send(End())
        except PeerVanished:
            pass
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close without a word: to a peer this is a broken stream."""
        self._ended = True
        await self._stream.aclose()
