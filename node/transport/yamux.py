"""Yamux: many streams over one connection, compatible with all of libp2p.

Why not libp2p's own. Its Yamux (0.8.1) sends a window update for every read, takes seven locks and as many
turns of the event loop for a message one way, kills a stream whose reader pauses for five seconds, and the
connection when a write is cancelled at the wrong moment; it shows a reset as an end of stream, and buffers
whatever a peer sends beyond its window. `benchmarks/stream.py` compares the two.

Theory of operation. One task receives: it decrypts message by message, cuts frames, and puts their contents
into the stream they are for; it never waits for anything but the socket, so a slow reader stalls nobody else.
What a peer may have under way on a stream is bounded by the window we granted; more ends the connection. We
grant again when half of the window has been read, and a bigger one when that took less than two round trips.

Frames of streams are written by the task that sends: encrypting and queueing happen without a suspension, in
one order (`TcpStream.write`), so a cancelled sender cannot tear a frame. Frames that answer something (a
window update, a pong) are written by a task of their own, because neither the receiving task nor a reader
may wait for the socket. That task also sends what the socket did not take of a frame that was to go at once.

What is urgent overtakes what was not encrypted yet. So one frame of data at a time is on its way to the
kernel (`send_lock`). It takes a tenth of a second (`_fit_frames`), and the kernel holds as much (`tcp.py`).
"""

from __future__ import annotations

import logging

import trio
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError, MuxedStreamReset
from multiaddr import Multiaddr

from p2pinfer.node.concurrency.fast_lock import FastLock
from p2pinfer.node.concurrency.shield import shielded

from .connection_gate import GATED, RESOURCE_LIMIT_EXCEEDED, Gate
from .counters import Traffic
from .line_rate import Line
from .noise import NoiseSession
from .yamux_frames import (
    ACK,
    DATA,
    FRAMES_AT_ONCE,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW,
    MAX_CONTROL_BYTES,
    MAX_GROWTH,
    MAX_STREAM_ID,
    NORMAL,
    PING,
    PROTOCOL_ERROR,
    RST,
    SYN,
    WINDOW_UPDATE,
    GoneAway,
    YamuxViolation,
    frame_bytes,
)
from .yamux_stream import Carrier, YamuxStream

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 30.0  # between measurements of the round trip
LEAST_INTERVAL_S = 1.0  # where a full router drops acknowledgements: every ping carries another one
LINGER_S = 60.0  # how long a stream that we closed may wait for the peer's own end


class YamuxConnection(Carrier):
    """All streams to one peer. libp2p's swarm makes it, runs `start`, and closes it."""

    def __init__(
        self,
        conn: NoiseSession,
        peer_id: ID,
        *,
        max_streams: int = 256,
        gate: Gate | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """`gate` decides about the peer's streams, over all of its connections; `traffic` counts bytes."""
        self.peer_id = peer_id
        self._gate = gate
        self._traffic = traffic or Traffic()
        self.secured_conn = conn
        self.event_started = trio.Event()
        self.rtt_s = 0.0  # measured; 0 until the first pong
        self.send_lock = FastLock()
        self._fit_frames()
        self.heard_at = trio.current_time()  # when the peer last sent anything
        self._max_streams = max_streams
        self._streams: dict[int, YamuxStream] = {}
        self._theirs, self._growth = 0, 0  # how many the peer opened; bytes of windows above the first
        self._who = str(peer_id), conn.meter.address_range
        self._next_id = 1 if conn.is_initiator else 2
        self._closed = trio.Event()
        self._control = bytearray()
        self._control_ready = trio.Event()
        self._pings: dict[int, trio.Event] = {}
        self._next_ping = 0
        self._accept_in, self._accept_out = trio.open_memory_channel[YamuxStream](max_streams)
        self._scope = trio.CancelScope()
        # The frame under way, when a peer's frames do not begin and end with Noise messages as ours do.
        self._partial, self._body_left = b"", 0
        self._body_stream: YamuxStream | None = None
        self._body_flags = 0

    # ------------------------------------------------------------------ for libp2p

    @property
    def is_initiator(self) -> bool:
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self._closed.is_set()

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    async def start(self) -> None:
        """Run the connection until it ends."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_answers)
                    nursery.start_soon(self._keep_measuring)
                    self.event_started.set()
                    await self._receive_until_the_end()
                    nursery.cancel_scope.cancel()
        finally:
            self._end()
            await self._hang_up()

    async def close(self) -> None:
        """Say goodbye, lose every stream, hang up. Harmless twice."""
        if self._closed.is_set():
            return
        self._end()
        with shielded(1):
            try:
                await self.secured_conn.write(HEADER.pack(0, GO_AWAY, 0, 0, NORMAL))
            except (BaseLibp2pError, OSError) as exc:
                logger.debug("connection.goodbye_failed peer=%s why=%r", self.peer_id, exc)
        await self._hang_up()
        self._scope.cancel()

    async def open_stream(self) -> YamuxStream:
        if self._closed.is_set():
            raise MuxedConnUnavailable("the connection is closed")
        if self._next_id > MAX_STREAM_ID:
            raise MuxedStreamError("the connection has used up its stream ids")
        stream = YamuxStream(self, self._next_id, ours=True)
        self._next_id += 2
        self._streams[stream.stream_id] = stream
        try:
            await self.send(HEADER.pack(0, WINDOW_UPDATE, SYN, stream.stream_id, 0))
        except BaseException:
            stream.abort()
            raise
        return stream

    async def accept_stream(self) -> YamuxStream:
        try:
            return await self._accept_out.receive()
        except trio.EndOfChannel:
            raise MuxedConnUnavailable("the connection is closed") from None

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.secured_conn.get_remote_address()

    async def ping(self) -> float:
        """See `Carrier.ping`; updates `rtt_s`."""
        if self._closed.is_set():
            raise MuxedConnUnavailable("the connection is closed")
        nonce = self._next_ping
        self._next_ping = (nonce + 1) % (1 << 32)
        answered = self._pings[nonce] = trio.Event()
        try:
            sent_at = trio.current_time()
            await self.send(HEADER.pack(0, PING, SYN, 0, nonce))
            await answered.wait()
        finally:
            self._pings.pop(nonce, None)
        if self._closed.is_set():
            raise MuxedConnUnavailable("the connection is closed")
        rtt_s = trio.current_time() - sent_at
        self.rtt_s = (self.rtt_s + rtt_s) / 2 if self.rtt_s else rtt_s
        self.secured_conn.raw.expect_round_trip(self.rtt_s, rtt_s)
        self._fit_frames()
        return rtt_s

    # ------------------------------------------------------------------ for the streams: see Carrier

    @property
    def line(self) -> Line:
        raw = self.secured_conn.raw
        return Line(self.rtt_s or raw.expected_rtt_s, raw.rate.bytes_per_s, raw.queued_bytes, raw.least_rtt_s)

    @property
    def local_port(self) -> int | None:
        return self.secured_conn.raw.local_port

    async def send(self, header: bytes, payload: bytes | memoryview = b"") -> None:
        self._traffic.sent += len(header) + len(payload)  # they are taken before the first suspension
        try:
            await self.secured_conn.write(b"".join((header, payload)))
        except (BaseLibp2pError, OSError) as exc:
            raise MuxedStreamReset(f"the connection is gone: {exc}") from exc
        self._fit_frames()  # a rate is measured while somebody waits here, and nowhere else

    def send_now(self, header: bytes, payload: bytes | memoryview) -> bool:
        if not self.secured_conn.write_now(b"".join((header, payload))):
            return False
        self._traffic.sent += len(header) + len(payload)
        if not self.secured_conn.stream.is_clear:
            self._control_ready.set()
        return True

    def answer(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self._control += HEADER.pack(0, kind, flags, stream_id, length)
        self._control_ready.set()
        if len(self._control) > MAX_CONTROL_BYTES:
            logger.debug("connection.violation peer=%s why=asks and does not read", self.peer_id)
            self._scope.cancel()

    def grow(self, size: int) -> int:
        if self._growth + size > MAX_GROWTH:
            return 0
        self._growth += size
        return size

    def forget(self, stream: YamuxStream) -> None:
        if self._streams.pop(stream.stream_id, None) is not None:
            self._growth -= stream.window - INITIAL_WINDOW
            if not stream.ours:
                self._theirs -= 1
                if self._gate is not None:
                    self._gate.give_back(*self._who)

    def _fit_frames(self) -> None:
        raw = self.secured_conn.raw
        self.frame_bytes = frame_bytes(raw.rate.bytes_per_s, raw.least_rtt_s)

    async def _send_answers(self) -> None:
        while True:
            await self._control_ready.wait()
            self._control_ready = trio.Event()
            frames, self._control = bytes(self._control), bytearray()
            try:
                await self.send(frames)
            except MuxedStreamReset:
                return  # the receiving task notices by itself

    async def _keep_measuring(self) -> None:
        while True:
            with trio.move_on_after(PING_INTERVAL_S):
                try:
                    await self.ping()
                except BaseLibp2pError:
                    return
            await trio.sleep(LEAST_INTERVAL_S)
            with trio.move_on_after(PING_INTERVAL_S - LEAST_INTERVAL_S):
                await self.secured_conn.raw.until_crowded()
            for stream in list(self._streams.values()):
                if stream.closed_at is not None and trio.current_time() - stream.closed_at > LINGER_S:
                    stream.abort()

    async def _receive_until_the_end(self) -> None:
        try:
            while True:
                message = await self.secured_conn.read()
                self._traffic.received += len(message)
                self.heard_at = trio.current_time()
                while message := self._feed(message):  # thousands of frames fit into one message
                    await trio.lowlevel.checkpoint()
        except YamuxViolation as exc:
            logger.debug("connection.violation peer=%s why=%s", self.peer_id, exc)
            with trio.move_on_after(1):
                await self.send(HEADER.pack(0, GO_AWAY, 0, 0, PROTOCOL_ERROR))
        except GoneAway as exc:
            logger.debug("connection.gone_away peer=%s code=%s", self.peer_id, exc)
            if self._gate is not None and exc.code == GATED:
                self._gate.note_turned_away(str(self.peer_id))
        except Exception as exc:  # the socket's, Noise's, libp2p's: the connection is over in any case
            logger.debug("connection.ended peer=%s why=%r", self.peer_id, exc)

    def _feed(self, message: bytes) -> bytes:
        """Take in any part of any number of decrypted frames; returns what is for the next call."""
        if self._partial:
            message, self._partial = self._partial + message, b""
        at = 0
        for _ in range(FRAMES_AT_ONCE):
            if at == len(message):
                return b""
            if self._body_left:
                piece = message[at : at + self._body_left]
                at += len(piece)
                self._continue_body(piece)
            elif len(message) - at < HEADER.size:
                self._partial = message[at:]
                return b""
            else:
                self._begin_frame(*HEADER.unpack_from(message, at))
                at += HEADER.size
        return message[at:]

    def _begin_frame(self, version: int, kind: int, flags: int, stream_id: int, length: int) -> None:
        if version:
            raise YamuxViolation(f"version {version}")
        if kind in (DATA, WINDOW_UPDATE):
            stream = self._accept(stream_id) if flags & SYN else self._streams.get(stream_id)
            if kind == DATA:
                self._begin_body(stream, flags, length)
            elif stream is not None and flags & RST:
                stream.reset_code = length
                stream.end_by(flags)
            elif stream is not None:
                stream.add_credit(length)
                stream.end_by(flags)
        elif kind == PING:
            if flags & SYN:
                self.answer(PING, ACK, 0, length)
            elif length in self._pings:
                self._pings[length].set()
        elif kind == GO_AWAY:
            raise GoneAway(length)
        else:
            raise YamuxViolation(f"a frame of type {kind}")

    def _begin_body(self, stream: YamuxStream | None, flags: int, length: int) -> None:
        """A stream that is None is over for us; what was under way to it is skipped."""
        if stream is not None:
            if length > stream.grantable:
                raise YamuxViolation(f"{length} bytes into a window of {stream.grantable}")
            stream.grantable -= length
        self._body_left, self._body_stream, self._body_flags = length, stream, flags
        if not length:
            self._continue_body(b"")

    def _continue_body(self, piece: bytes) -> None:
        self._body_left -= len(piece)
        stream = self._body_stream
        if stream is not None:
            if piece:
                stream.receive(piece)
            if self._body_flags and not self._body_left:
                stream.end_by(self._body_flags)

    def _accept(self, stream_id: int) -> YamuxStream | None:
        if stream_id % 2 != (not self.is_initiator) % 2 or not stream_id or stream_id in self._streams:
            raise YamuxViolation(f"stream {stream_id} cannot be opened")
        code = self._refusal()
        if code:
            logger.debug("stream.refused peer=%s open=%s code=%#x", self.peer_id, self._theirs, code)
            self.answer(WINDOW_UPDATE, RST, stream_id, code)
            return None
        stream = YamuxStream(self, stream_id, ours=False)
        self._accept_in.send_nowait(stream)
        self._streams[stream_id] = stream
        self._theirs += 1
        self.answer(WINDOW_UPDATE, ACK, stream_id, 0)
        return stream

    def _refusal(self) -> int:
        """The number to refuse the peer's next stream with; 0 lets it in."""
        code = self._gate.take_stream(*self._who) if self._gate is not None else 0
        waiting = self._accept_in.statistics().current_buffer_used
        if code or max(self._theirs, waiting) < self._max_streams:
            return code
        if self._gate is not None:
            self._gate.give_back(*self._who)
        return RESOURCE_LIMIT_EXCEEDED

    # ------------------------------------------------------------------ ending

    def _end(self) -> None:
        """Nothing goes in or out any more; whoever waits is told."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._accept_in.close()
        for stream in list(self._streams.values()):
            stream.lose()
        for answered in self._pings.values():
            answered.set()

    async def _hang_up(self) -> None:
        with shielded(1):
            try:
                await self.secured_conn.close()
            except (BaseLibp2pError, OSError) as exc:
                logger.debug("connection.close_failed peer=%s why=%r", self.peer_id, exc)
