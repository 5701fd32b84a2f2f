"""Interface of the bytes below Noise and yamux, whether a socket or a relay carries them.

libp2p's own streams read the length and the body of every Noise message separately, and a write cancelled
half-way leaves the peer with half a message, after which it can decrypt nothing more. Here reading is done in
large pieces, and what is written is taken before the first suspension: who writes first is sent first, and a
cancelled writer leaves its bytes to the next one. `node/transport/yamux.py` relies on that.
"""

from __future__ import annotations

from abc import abstractmethod

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

from .line_rate import LineRate


class RawStream(ReadWriteCloser):
    """Reads and writes as described above, over two hooks.

    Attributes:
        closed: Set once the connection has ended.
        is_clear: True while nothing waits to be sent, so that `write_now` will do.
        rate: How fast it takes what is written, measured while writers wait.
        rtt_s: Round trip as it was told; 0 if it was not.
        expected_rtt_s: About a round trip, for the patience with a peer before one was told.
        least_rtt_s: The shortest that was told. Busy processors lengthen the others, which tells nothing of
            the line.
        local_ip: The IP address that a socket leaves from; empty if there is no socket.
        local_port: Its port; None if there is no socket.
    """

    def __init__(self) -> None:
        self.closed = trio.Event()
        self.rate = LineRate()
        self.rtt_s = self.least_rtt_s = self.expected_rtt_s = 0.0
        self.local_ip = ""
        self.local_port: int | None = None
        self.is_clear = True
        self._received: bytes = b""
        self._read = 0  # how much of it was handed out
        self._outbox = bytearray()
        self._taken = 0  # bytes ever put into the outbox
        self._sending = False
        self._progress = trio.lowlevel.ParkingLot()

    async def read(self, n: int | None = None) -> bytes:
        """Read at most `n` bytes; does not suspend while some are left of what was received before.

        Raises:
            ConnectionClosedError: The connection has ended.
        """
        if self._read == len(self._received):
            self._received = await self._receive()
            self._read = 0
        start = self._read
        self._read = len(self._received) if n is None else min(start + n, len(self._received))
        return self._received[start : self._read]

    async def write(self, data: bytes) -> None:
        """Send `data`, taking it before the first suspension: who writes first is sent first.

        A caller that is cancelled leaves its bytes behind, and the next one sends them.

        Raises:
            ConnectionClosedError: The connection has ended.
        """
        if self.closed.is_set():  # what is never sent is not kept
            await trio.lowlevel.checkpoint()
            raise ConnectionClosedError("the connection is closed")
        self._outbox += data
        self._taken += len(data)
        self.is_clear = False
        until = self._taken
        while self._taken - len(self._outbox) < until:
            if self._sending:
                await self._progress.park()
                continue
            self._sending = True
            try:
                await self._send_some(self._outbox)
            finally:
                self._sending = False
                self.is_clear = not self._outbox
                self._progress.unpark_all()
        self.is_clear = not (self._outbox or self._sending)

    @property
    def has_heard(self) -> bool:
        """True if the other end has said anything yet."""
        return bool(self._received)

    @property
    def queued_bytes(self) -> int:
        """Bytes that were written and that the other end has not acknowledged, as far as that is known."""
        return len(self._outbox)

    async def until_crowded(self) -> None:
        """Wait until it goes out over a thin line that is full, as far as that is known."""
        await trio.sleep_forever()

    def expect_round_trip(self, rtt_s: float, latest_s: float = 0.0) -> None:
        """Hear how long an acknowledgement takes here, and how long the last one took; limits follow it."""
        self.rtt_s = rtt_s
        if found := latest_s or rtt_s:
            self.least_rtt_s = min(self.least_rtt_s or found, found)

    def write_now(self, data: bytes) -> bool:
        """Write `data` if nobody is before it; False, with nothing written, if somebody is.

        What cannot be sent at once goes out with the next `write`.
        """
        if not self.is_clear:
            return False
        self._outbox += data
        self._taken += len(data)
        self._send_now(self._outbox)
        self.is_clear = not self._outbox
        return True

    @abstractmethod
    async def _receive(self) -> bytes:
        """Bytes that have arrived, at least one; ConnectionClosedError at the end."""

    @abstractmethod
    async def _send_some(self, outbox: bytearray) -> None:
        """Send some of the beginning of `outbox` and delete just that, also when cancelled.

        ConnectionClosedError, after setting `closed`, if nothing can be sent any more.
        """

    def _send_now(self, outbox: bytearray) -> None:
        """Send what can be sent of `outbox` without a suspension, and delete just that; nothing is enough."""
