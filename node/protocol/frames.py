"""Frames of messages, and the streams on which they are sent and read.

A frame is two big-endian u32 lengths, a header of the first length and a payload of the second. The header is
a message (see `wire`); the payload is a tensor's bytes (see `tensors`), empty for every message but `Step`
and `Result`. A stream ends with `End`: libp2p shows a reset and an orderly close alike to a reader, so
without the marker a cut stream would pass for a finished one.

Lengths are checked before memory is taken. Whatever is no frame is a `ProtocolViolation`.
"""

from __future__ import annotations

import math
import struct
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

import trio
import trio.abc

from p2pinfer.errors import PeerError, PeerVanished, ProtocolViolation
from p2pinfer.node.concurrency.fast_lock import FastLock
from p2pinfer.node.concurrency.loop_share import Meter
from p2pinfer.node.transport.line_rate import NO_LINE, Line
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.reputation.receipt import Payload

from .messages import MALFORMED, End, Message, Result, Step, decode_message, encode_message

MAX_HEADER_BYTES: Final = 1 << 16
_READ_BYTES: Final = 1 << 18
_LENGTHS: Final = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class MinimumRate:
    """The slowest that a peer may send or take in a frame that has begun."""

    grace_s: float
    bytes_per_s: float

    def limit_s(self, frame_bytes: int) -> float:
        """Seconds that a frame of so many bytes may take."""
        return self.grace_s + frame_bytes / self.bytes_per_s


def encode_header(message: Message, payload_bytes: int) -> bytes:
    """Everything of a frame that precedes its payload."""
    header = encode_message(message)
    return _LENGTHS.pack(len(header), payload_bytes) + header


class FrameStream:
    """Frames over a byte stream. One task may receive; any number may send, one whole frame at a time.

    A peer that sends or reads more slowly than `minimum_rate` is cut off. How long it pauses between frames
    is for others to judge.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        max_payload_bytes: int,
        peer_id: str = "",
        minimum_rate: MinimumRate | None = None,
    ) -> None:
        self.peer_id = peer_id
        # Counts what the peer's messages take of the event loop.
        self.meter: Meter | None = stream.meter if isinstance(stream, PeerStream) else None
        self._minimum_rate = minimum_rate
        self.max_payload_bytes = max_payload_bytes
        self._stream = stream
        self._send_at_once = stream.send_now if isinstance(stream, PeerStream) else _send_later
        self._sending = FastLock()
        self._buffer = bytearray()
        self._frame_bytes = 0  # of the frame that comes, as far as it is known
        self._ended = False

    @property
    def line(self) -> Line:
        """State of the line to the peer; nothing where there is none."""
        return self._stream.line if isinstance(self._stream, PeerStream) else NO_LINE

    @property
    def sent_bytes(self) -> int:
        """Bytes that were handed over so far; it grows while a long frame goes out."""
        return self._stream.muxed.bytes_sent if isinstance(self._stream, PeerStream) else 0

    @property
    def can_ping(self) -> bool:
        """True if the peer can be asked for a sign of life ahead of what it is being sent."""
        return isinstance(self._stream, PeerStream)

    async def is_answered(self, within_s: float) -> bool:
        """True if the peer shows a sign of life on the connection; False also if the connection is gone.

        The question overtakes frames under way, and the answer comes from the peer's event loop, so neither a
        long prompt nor a busy device delays it. `within_s` is for a line that takes no time.
        """
        assert isinstance(self._stream, PeerStream)
        return await self._stream.is_answered(within_s)

    async def hang_up(self) -> None:
        """End the connection below, if there is one, since nothing comes on it any more."""
        if isinstance(self._stream, PeerStream):
            await self._stream.hang_up()

    def send_now(self, message: Message, payload: Payload = b"") -> bool:
        """Send one frame if that takes no waiting; False, with nothing sent, if it does or cannot be done."""
        return not self._sending.is_held and self._send_at_once(_frame(message, payload))

    async def send(self, message: Message, payload: Payload = b"") -> None:
        """Send one frame.

        Raises:
            PeerVanished: The stream is gone, or the peer is too slow. A cancelled send leaves half
                a frame: close the stream then.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        frame = _frame(message, payload)
        if not self._sending.is_held and self._send_at_once(frame):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        limit_s = self._minimum_rate.limit_s(len(frame)) if self._minimum_rate else math.inf
        async with self._sending:
            try:
                with trio.fail_after(limit_s) if limit_s < math.inf else nullcontext():
                    await self._stream.send_all(frame)
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
            await self._read_more(math.inf)
        else:  # a quarter of a megabyte of small frames may have come at once, and others want their turn
            await trio.lowlevel.checkpoint()
        began_at: float | None = None
        while (frame := self._cut()) is None:
            if began_at is None:
                began_at = trio.current_time()
            limit_s = self._minimum_rate.limit_s(self._frame_bytes) if self._minimum_rate else math.inf
            await self._read_more(began_at + limit_s)
        return frame

    def _cut(self) -> tuple[Message, bytearray] | None:
        """The frame that the buffer begins with; None while `_frame_bytes` of it have not come."""
        buffer = self._buffer
        self._frame_bytes = _LENGTHS.size
        if len(buffer) < _LENGTHS.size:
            return None
        header_bytes, payload_bytes = _LENGTHS.unpack_from(buffer)
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > self.max_payload_bytes:
            raise ProtocolViolation(
                f"a frame of {header_bytes} + {payload_bytes} bytes; "
                f"at most {MAX_HEADER_BYTES} + {self.max_payload_bytes} are allowed here",
                self.peer_id,
            )
        head = _LENGTHS.size + header_bytes
        self._frame_bytes = head + payload_bytes
        if len(buffer) < self._frame_bytes:
            return None
        try:
            message = decode_message(buffer[_LENGTHS.size : head])
        except MALFORMED as exc:  # which may quote the peer
            raise ProtocolViolation("not a message of this protocol", self.peer_id) from exc
        if payload_bytes and not isinstance(message, Step | Result):
            raise ProtocolViolation(f"a {type(message).__name__} with a payload", self.peer_id)
        payload = buffer[head : self._frame_bytes]
        del buffer[: self._frame_bytes]
        return message, payload

    async def _read_more(self, deadline: float) -> None:
        """Add to the buffer what arrives next. It grows only by what has really arrived."""
        try:
            with trio.fail_at(deadline) if deadline < math.inf else nullcontext():
                received = await self._stream.receive_some(_READ_BYTES)
        except trio.TooSlowError as exc:
            raise ProtocolViolation("a frame that comes too slowly", self.peer_id) from exc
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise PeerVanished("the stream broke", self.peer_id) from exc
        if not received:
            what = "in the middle of a frame" if self._buffer else "without its end marker"
            raise PeerVanished(f"the stream ended {what}", self.peer_id)
        self._buffer += received

    async def end(self, *, keep: bool = False) -> None:
        """Say that nothing follows and close; quiet when the peer is already gone. `keep` as in `End`."""
        if self._ended:
            return
        self._ended = True
        try:
            await self.send(End(keep))
        except PeerError:
            pass
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close without a word: to a peer this is a broken stream."""
        self._ended = True
        await self._stream.aclose()


def _frame(message: Message, payload: Payload) -> bytes:
    header = encode_message(message)
    return b"".join((_LENGTHS.pack(len(header), len(payload)), header, payload))


def _send_later(_: bytes) -> bool:
    return False
