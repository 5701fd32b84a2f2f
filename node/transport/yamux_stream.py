"""Stream of a yamux connection: its receive buffer, send window and end."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from contextlib import suppress

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from p2pinfer.node.concurrency.fast_lock import FastLock

from .connection_gate import reason
from .line_rate import Line
from .yamux_frames import (
    DATA,
    FIN,
    HEADER,
    INITIAL_WINDOW,
    MAX_WINDOW,
    RST,
    SMALL_BYTES,
    WINDOW_UPDATE,
    YamuxViolation,
)


class StreamRefused(MuxedStreamReset):
    """The peer lets us open no such stream at the moment; the message says why."""


class Carrier(IMuxedConn):
    """The part of a connection that a stream on it needs.

    Attributes:
        rtt_s: The round trip as measured; 0 until it was.
        heard_at: When the peer last sent anything.
        send_lock: Held while a frame of data goes out. Frames without data go before those that wait for it.
        frame_bytes: The most that a frame of data is to carry, by what is known of the line.
    """

    rtt_s: float
    heard_at: float
    send_lock: FastLock
    frame_bytes: int

    @property
    @abstractmethod
    def line(self) -> Line:
        """State of the line, as measured."""

    @property
    @abstractmethod
    def local_port(self) -> int | None:
        """The port that a direct connection leaves from; None through a relay."""

    @abstractmethod
    async def ping(self) -> float:
        """The seconds of one round trip.

        Raises:
            MuxedConnUnavailable: The connection has ended.
        """

    async def is_answered(self, within_s: float) -> bool:
        """True if the peer answers a ping; False if nothing comes for so long, or the connection is gone.

        The question overtakes what is being sent. Its answer may be long in coming where the peer's line has
        much to carry, so whatever comes is a sign of life. `within_s` is for a line that takes no time.
        """
        asked_at = trio.current_time()
        with suppress(BaseLibp2pError):
            while trio.current_time() < (
                until := max(asked_at, self.heard_at) + self.line.patience_s(within_s)
            ):
                with trio.move_on_at(until):
                    await self.ping()
                    return True
        return False

    @abstractmethod
    async def send(self, header: bytes, payload: bytes | memoryview = b"") -> None:
        """Write one frame; at a cancellation it is sent all the same.

        Raises:
            MuxedStreamReset: The connection is gone.
        """

    @abstractmethod
    def send_now(self, header: bytes, payload: bytes | memoryview) -> bool:
        """Write one frame if that takes no waiting; False, with nothing written, if it does."""

    @abstractmethod
    def answer(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Have a frame without payload written as soon as possible."""

    @abstractmethod
    def grow(self, size: int) -> int:
        """Part of `size` by which a window may grow."""

    @abstractmethod
    def forget(self, stream: YamuxStream) -> None:
        """The stream is over. Harmless twice."""

    @abstractmethod
    def get_remote_address(self) -> tuple[str, int] | None:
        """The IP address and port that it leads to, if it is a direct one."""


class YamuxStream(IMuxedStream):
    """One of the streams of `muxed_conn`; a byte pipe each way, each with its own end."""

    def __init__(self, connection: Carrier, stream_id: int, *, ours: bool) -> None:
        self.muxed_conn = connection  # by libp2p's name for it
        self._connection = connection
        self.stream_id = stream_id
        self.ours = ours
        self.closed_at: float | None = None  # when we stopped reading; nothing more is wanted
        self.reset_code = 0  # why the peer reset it, by its word
        self.bytes_sent = 0
        self.window = INITIAL_WINDOW
        self.grantable = INITIAL_WINDOW  # bytes the peer may still send
        self._inbox: deque[bytes] = deque()
        self._offset = 0  # into the first piece of the inbox
        self._read_since_grant = 0
        self._granted_at = 0.0
        self._credit = INITIAL_WINDOW  # bytes we may still send
        self._end_sent = False
        self._end_received = False
        self._lost = False  # reset by either side, or the connection is gone
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    # ------------------------------------------------------------------ for whoever uses the stream

    async def read(self, n: int | None = None) -> bytes:
        """Bytes that have arrived, at least one and at most `n`; it does not wait for more.

        Raises:
            MuxedStreamEOF: The peer has ended its side.
            MuxedStreamReset: The stream or the connection is gone.
        """
        if n == 0:
            return b""
        while not self._inbox:
            if self.closed_at is not None:
                raise MuxedStreamClosed("the stream is closed for receiving")
            if self._lost:
                raise self._reset_error()
            if self._end_received:
                raise MuxedStreamEOF("the peer has ended the stream")
            await self._readers.park()
        taken = self._take(n if n is not None and n > 0 else None)
        self._read_since_grant += len(taken)
        if self._read_since_grant * 2 >= self.window:
            self._grant()
        return taken

    @property
    def line(self) -> Line:
        """State of the connection's line."""
        return self._connection.line

    @property
    def local_port(self) -> int | None:
        """See `Carrier.local_port`."""
        return self._connection.local_port

    async def is_answered(self, within_s: float) -> bool:
        """See `Carrier.is_answered`."""
        return await self._connection.is_answered(within_s)

    def has_input(self) -> bool:
        """True if `read` would return at once."""
        return bool(self._inbox) or self._lost or self._end_received

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, waiting for the peer's window for as long as it takes.

        Raises:
            MuxedStreamClosed: We have ended our side.
            MuxedStreamReset: The stream or the connection is gone.
        """
        view = memoryview(data)
        await self.wait_writable()
        while view:
            # One frame of one stream at a time: the others' come in between, and what is urgent before them.
            async with self._connection.send_lock:
                self._check_writable()  # it may have ended while others had their turn
                size = min(self._credit, self._connection.frame_bytes, len(view))
                self._credit -= size
                self.bytes_sent += size
                await self._connection.send(HEADER.pack(0, DATA, 0, self.stream_id, size), view[:size])
            view = view[size:]
            if view:
                await self.wait_writable()

    def write_now(self, data: bytes) -> bool:
        """Send `data` in one frame if that takes no waiting; False, with nothing sent, if it does."""
        size = len(data)
        if self._lost or self._end_sent or size > self._credit or size > self._connection.frame_bytes:
            return False
        if not self._connection.send_now(HEADER.pack(0, DATA, 0, self.stream_id, size), data):
            return False
        self._credit -= size
        self.bytes_sent += size
        return True

    async def wait_writable(self) -> None:
        """Wait until the peer's window has room.

        Raises:
            MuxedStreamClosed, MuxedStreamReset: As for `write`.
        """
        while True:
            self._check_writable()
            if self._credit:
                return
            await self._writers.park()

    async def close(self) -> None:
        """End our side; the peer may go on sending."""
        self.end()
        await trio.lowlevel.checkpoint()

    def end(self) -> None:
        """`close` without a suspension: the end follows what was written."""
        if not (self._end_sent or self._lost):
            self._end_sent = True
            self._connection.answer(WINDOW_UPDATE, FIN, self.stream_id, 0)
            self._writers.unpark_all()
            self._forget_if_over()

    def discard(self) -> None:
        """Read no more. What the peer still sends is answered with a reset, as TCP does."""
        if self.closed_at is None:
            self.closed_at = trio.current_time()
            if self._inbox:
                self.abort()
            self._readers.unpark_all()

    async def reset(self) -> None:
        """Drop the stream; the peer sees an error."""
        self.abort()
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """`reset` without a suspension."""
        if not self._lost:
            if not (self._end_sent and self._end_received):
                self._connection.answer(WINDOW_UPDATE, RST, self.stream_id, 0)
            self._inbox.clear()
            self.lose()

    def set_deadline(self, ttl: int) -> None:
        raise NotImplementedError("use trio.fail_after around reads and writes")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._connection.get_remote_address()

    async def __aenter__(self) -> YamuxStream:
        return self

    # ------------------------------------------------------------------ for the connection

    def lose(self) -> None:
        """The stream is over: what has arrived can still be read, then comes the reset."""
        self._lost = True
        self._connection.forget(self)
        self._readers.unpark_all()
        self._writers.unpark_all()

    def receive(self, piece: bytes) -> None:
        if self.closed_at is not None:
            self.abort()
        elif not self._lost:
            # A window of two-byte pieces would take thirty times as much memory as it grants.
            if self._inbox and len(piece) + len(self._inbox[-1]) <= SMALL_BYTES:
                self._inbox[-1] += piece
            else:
                self._inbox.append(piece)
            self._readers.unpark_all()

    def end_by(self, flags: int) -> None:
        """The peer's frame had these flags."""
        if flags & RST:
            self.lose()
        elif flags & FIN:
            self._receive_end()

    def add_credit(self, size: int) -> None:
        self._credit += size
        if self._credit > 1 << 32:
            raise YamuxViolation(f"a window of {self._credit} bytes")
        self._writers.unpark_all()

    # ------------------------------------------------------------------ private

    def _check_writable(self) -> None:
        if self._lost:
            raise self._reset_error()
        if self._end_sent:
            raise MuxedStreamClosed("the stream is closed for sending")

    def _reset_error(self) -> MuxedStreamReset:
        why = reason(self.reset_code)
        return StreamRefused(why) if why else MuxedStreamReset("the stream was reset")

    def _receive_end(self) -> None:
        self._end_received = True
        self._readers.unpark_all()
        self._forget_if_over()

    def _take(self, limit: int | None) -> bytes:
        """Whole pieces as far as they fit, else the beginning of the first."""
        first = self._inbox[0]
        if not self._offset and len(self._inbox) == 1 and (limit is None or len(first) <= limit):
            return self._inbox.popleft()
        if limit is not None and len(first) - self._offset > limit:
            self._offset += limit
            return first[self._offset - limit : self._offset]
        parts = [first[self._offset :]]
        size = len(parts[0])
        self._inbox.popleft()
        self._offset = 0
        while self._inbox and (limit is None or size + len(self._inbox[0]) <= limit):
            size += len(self._inbox[0])
            parts.append(self._inbox.popleft())
        return b"".join(parts)

    def _grant(self) -> None:
        """Let the peer send as much again as was read, or more if we read as fast as it can send."""
        now = trio.current_time()
        granted = self._read_since_grant
        if now - self._granted_at < 2 * self._connection.rtt_s and self.window < MAX_WINDOW:
            grown = self._connection.grow(self.window)
            self.window += grown
            granted += grown
        self._granted_at = now
        self._read_since_grant = 0
        if not (self._end_received or self._lost):
            self.grantable += granted
            self._connection.answer(WINDOW_UPDATE, 0, self.stream_id, granted)

    def _forget_if_over(self) -> None:
        if self._end_sent and self._end_received:
            self._connection.forget(self)
