"""Streams of training: a message and its payload, framed as in sessions, of megabytes as a rule.

    u32 header length | u32 payload length | header | payload          lengths big-endian

`frames` does the same for steps, where each microsecond counts. Here a frame is a microbatch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from contextlib import nullcontext
from typing import Final

import trio
import trio.abc

from p2pinfer.errors import PeerVanished, ProtocolViolation
from p2pinfer.node.concurrency.loop_share import Meter
from p2pinfer.node.transport.peer_stream import PeerStream
from p2pinfer.reputation.receipt import Payload

from .frames import MinimumRate
from .messages import MALFORMED, encode_message
from .train_messages import WITH_PAYLOAD, Done, TrainMessage, decode_train_message

MAX_TRAIN_HEADER_BYTES: Final = 1 << 19  # an adapter's layout: 4096 updates of some 40 bytes
_READ_BYTES: Final = 1 << 18
_LENGTHS: Final = struct.Struct(">II")


class FirstPart:
    """The first bytes of a payload, for whoever does not wait for the others.

    Attributes:
        size: How many bytes.
        known: Set once it is clear if they come.
        content: They; None while they are not here, and if they do not come.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.known = trio.Event()
        self.content: bytearray | None = None

    def settle(self, content: bytearray | None = None) -> None:
        """Have them here, or say that they do not come; nothing if that is known."""
        if not self.known.is_set():
            self.content = content
            self.known.set()


def _not_apart(_: TrainMessage) -> None: ...


class TrainStream:
    """Messages over a byte stream. One task may receive; any number may send, one whole frame at a time.

    Attributes:
        max_payload_bytes: A larger payload is refused before memory is taken for it.
        meter: Counts what the peer's messages take of the event loop; None: nobody does.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        max_payload_bytes: int,
        peer_id: str = "",
        minimum_rate: MinimumRate | None = None,
    ) -> None:
        """A stream whose peer is cut off if it sends or reads a frame more slowly than `minimum_rate`."""
        self.peer_id = peer_id
        self.max_payload_bytes = max_payload_bytes
        self.meter: Meter | None = stream.meter if isinstance(stream, PeerStream) else None
        self._stream = stream
        self._minimum_rate = minimum_rate
        self._sending = trio.Lock()
        self._buffer = bytearray()

    async def send(self, message: TrainMessage, *payload: Payload) -> None:
        """Send one message, its payload in any number of parts.

        Raises:
            PeerVanished: The stream is gone, or the peer is too slow.
        """
        header = encode_message(message)
        size = sum(map(len, payload))
        head = _LENGTHS.pack(len(header), size) + header
        limit_s = self._limit_s(len(head) + size)
        async with self._sending:
            try:
                with trio.fail_after(limit_s) if limit_s < math.inf else nullcontext():
                    for part in (head, *payload):
                        if part:
                            await self._stream.send_all(part)
            except trio.TooSlowError as exc:
                await trio.aclose_forcefully(self._stream)
                raise PeerVanished(f"took no frame in within {limit_s:.0f} s", self.peer_id) from exc
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise PeerVanished("the stream ended while sending", self.peer_id) from exc

    async def receive(
        self, first_part: Callable[[TrainMessage], FirstPart | None] = _not_apart
    ) -> tuple[TrainMessage, bytearray]:
        """The next message and its payload, which the caller owns.

        Args:
            first_part: What a message's payload begins with that somebody waits for; it is settled as soon as
                it is here.

        Raises:
            PeerVanished: The stream broke, or ended without `Done`.
            ProtocolViolation: What came is no frame of this protocol, is too large, or comes too slowly.
        """
        await self._fill(_LENGTHS.size, math.inf)
        header_bytes, payload_bytes = _LENGTHS.unpack_from(self._buffer)
        if header_bytes > MAX_TRAIN_HEADER_BYTES or payload_bytes > self.max_payload_bytes:
            raise ProtocolViolation(
                f"a frame of {header_bytes} + {payload_bytes} bytes; "
                f"at most {MAX_TRAIN_HEADER_BYTES} + {self.max_payload_bytes} are allowed here",
                self.peer_id,
            )
        head = _LENGTHS.size + header_bytes
        deadline = trio.current_time() + self._limit_s(head + payload_bytes)
        await self._fill(head, deadline)
        try:
            message = decode_train_message(self._buffer[_LENGTHS.size : head])
        except MALFORMED as exc:  # which may quote the peer
            raise ProtocolViolation("not a message of this protocol", self.peer_id) from exc
        if payload_bytes and not isinstance(message, WITH_PAYLOAD):
            raise ProtocolViolation(f"a {type(message).__name__} with a payload", self.peer_id)
        del self._buffer[:head]
        first = first_part(message)
        if first is not None and first.size <= payload_bytes:
            await self._fill(first.size, deadline)
            first.settle(self._buffer[: first.size])
        await self._fill(payload_bytes, deadline)
        if len(self._buffer) == payload_bytes:
            payload, self._buffer = self._buffer, bytearray()
        else:
            payload = self._buffer[:payload_bytes]
            del self._buffer[:payload_bytes]
        return message, payload

    def _limit_s(self, frame_bytes: int) -> float:
        return self._minimum_rate.limit_s(frame_bytes) if self._minimum_rate else math.inf

    async def _fill(self, size: int, deadline: float) -> None:
        """Read until so much is in the buffer, which grows only by what has really arrived."""
        await trio.lowlevel.checkpoint()
        while len(self._buffer) < size:
            if self._buffer and deadline == math.inf:  # a frame has begun to come
                deadline = trio.current_time() + self._limit_s(size)
            try:
                with trio.fail_at(deadline) if deadline < math.inf else nullcontext():
                    received = await self._stream.receive_some(_READ_BYTES)
            except trio.TooSlowError as exc:
                raise ProtocolViolation("a frame that comes too slowly", self.peer_id) from exc
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise PeerVanished("the stream broke", self.peer_id) from exc
            if not received:
                raise PeerVanished("the stream ended without its last message", self.peer_id)
            self._buffer += received

    async def finish(self) -> None:
        """Say that nothing follows and close; quiet when the peer is already gone."""
        try:
            await self.send(Done())
        except PeerVanished:
            pass
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close without a word: to the peer this is a broken stream."""
        await self._stream.aclose()
