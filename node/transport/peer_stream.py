"""Byte stream to a peer: trio's Stream over a libp2p stream, with one error for every loss."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any, Protocol, cast

import trio
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF

from p2pinfer.errors import PeerError, PeerVanished
from p2pinfer.node.concurrency.loop_share import Meter
from p2pinfer.node.concurrency.shield import shielded

from .addresses import range_of_connection
from .line_rate import Line
from .yamux_stream import YamuxStream

RECEIVE_BYTES = 1 << 18  # what is handed out at once to those who do not say how much they want


class StreamBroken(PeerVanished, trio.BrokenResourceError):
    """A `PeerVanished` that generic trio code understands as well."""


class Agreement(Protocol):
    """Agreement of the peer to the stream's protocol, which comes before all that it says in it."""

    async def read(self, muxed: YamuxStream) -> None:
        """Read it; raises PeerError."""
        ...

    def explain(self, exc: BaseLibp2pError) -> PeerError:
        """The error for a loss before it was read."""
        ...


class PeerStream(trio.abc.Stream):
    """One stream to `peer_id`, opened by `Host.open_stream` or handed to a handler of `Host.serve`.

    One task may send while another receives. A peer that does not read makes a sender wait, for as long as it
    takes: who needs a limit uses `trio.fail_after`. Everything libp2p raises comes out as `PeerVanished`.
    """

    def __init__(self, stream: Any, peer_id: str, agreement: Agreement | None = None) -> None:
        """`agreement` is read before what else comes."""
        self.peer_id = peer_id
        self._agreement = agreement
        # libp2p's NetStream keeps account of streams; its reads and writes only add locks to the muxer's.
        self._account = stream
        self.muxed: YamuxStream = stream.muxed_stream
        self._closed = False
        self._sending = False
        self._receiving = False

    @property
    def is_relayed(self) -> bool:
        """True if it runs over a connection through a relay."""
        return self.muxed.muxed_conn.get_connection_type() == ConnectionType.RELAYED

    @property
    def remote_address(self) -> tuple[str, int] | None:
        """The IP address and port that the peer's connection comes from; None through a relay."""
        return self.muxed.get_remote_address()

    @property
    def address_range(self) -> str:
        """The addresses that limits count together with the peer's: see `addresses.range_of_connection`."""
        connection = self.muxed.muxed_conn
        return range_of_connection(self.remote_address, connection.get_transport_addresses())

    @property
    def local_port(self) -> int | None:
        """The port that the stream's connection leaves from; None through a relay."""
        return self.muxed.local_port

    @property
    def local_ip(self) -> str:
        """The IP address of this machine that the stream's connection leaves from; empty through a relay."""
        return str(cast(Any, self.muxed.muxed_conn).secured_conn.raw.local_ip)

    @property
    def meter(self) -> Meter:
        """Counts what the peer's messages take of the event loop."""
        return cast(Meter, cast(Any, self.muxed.muxed_conn).meter)

    @property
    def is_inbound(self) -> bool:
        """True if the peer made the connection."""
        return not self.muxed.muxed_conn.is_initiator

    @property
    def line(self) -> Line:
        """State of the line that the stream runs over."""
        return self.muxed.line

    async def is_answered(self, within_s: float) -> bool:
        """True if the peer shows a sign of life on the stream's connection, ahead of whatever is being sent.

        Args:
            within_s: How long that may take on a line that takes no time.
        """
        answered: bool = await self.muxed.is_answered(within_s)
        return answered

    async def hang_up(self) -> None:
        """End the stream's connection, on which the peer answers no more. The next stream makes another."""
        with shielded(1):
            await self.muxed.muxed_conn.close()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`.

        Cancelled after some of it went out and not all, it resets the stream (not the connection): the peer
        would take whatever followed for the rest.

        Raises:
            PeerVanished: The peer, the stream or the connection is gone.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._check_open()
            before = self.muxed.bytes_sent
            try:
                await self.muxed.write(data)
            except trio.Cancelled:
                # What went out whole is on its way all the same: see `YamuxConnection.send`.
                if 0 < self.muxed.bytes_sent - before < len(data):
                    self.muxed.abort()
                raise
            except BaseLibp2pError as exc:
                raise self._lost("while sending to it", exc) from exc
            if not data:
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._sending = False

    def send_now(self, data: bytes) -> bool:
        """Send `data` if that takes no waiting; False, with nothing sent, if it does or cannot be done."""
        return not (self._sending or self._closed) and self.muxed.write_now(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the peer has room for at least one byte."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_open()
            await self.muxed.wait_writable()
        except BaseLibp2pError as exc:
            raise self._lost("while sending to it", exc) from exc
        finally:
            self._sending = False

    async def confirm(self) -> None:
        """Wait until the peer has agreed to the stream's protocol.

        Raises:
            PeerError: It does not, or is gone: as `Host.open_stream` has it.
        """
        if self._agreement is None:
            return
        try:
            await self._agreement.read(self.muxed)
        except PeerError as exc:
            if self._closed:
                raise trio.ClosedResourceError("another task closed this stream") from exc
            raise
        self._agreement = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes that have arrived, at most `max_bytes`; b"" once the peer has ended its side.

        Raises:
            PeerVanished: The peer reset the stream, or the connection is gone.
            PeerError: As `confirm`, if that was not awaited.
        """
        if max_bytes is not None and index(max_bytes) < 1:
            raise ValueError("max_bytes must be positive")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True
        try:
            if self._closed or self.muxed.has_input():
                await trio.lowlevel.checkpoint()
                self._check_open()
            await self.confirm()
            return await self.muxed.read(max_bytes or RECEIVE_BYTES)
        except MuxedStreamEOF:
            return b""
        except BaseLibp2pError as exc:
            raise self._lost("while receiving from it", exc) from exc
        finally:
            self._receiving = False

    async def aclose(self) -> None:
        """Close both directions without waiting for the peer; what was sent still arrives. Harmless twice."""
        await self._close(self.muxed.end)

    async def reset(self) -> None:
        """Close both directions, and let the peer see an error instead of an end. Harmless twice."""
        await self._close(self.muxed.abort)

    async def _close(self, close: Callable[[], None]) -> None:
        if not self._closed:
            self._closed = True
            close()
            self.muxed.discard()
            with shielded(1):
                await self._account.remove()
        await trio.lowlevel.checkpoint()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream is closed")

    def _lost(self, when: str, exc: BaseLibp2pError) -> Exception:
        """Exception to raise for an error of libp2p's."""
        if self._closed:
            return trio.ClosedResourceError("another task closed this stream")
        if self._agreement is not None:
            return self._agreement.explain(exc)
        return StreamBroken(f"peer {self.peer_id} vanished {when}: {exc}", self.peer_id)
