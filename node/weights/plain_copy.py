"""Chunks over a TCP connection of their own, without encryption, between peers of one network.

Weights that anybody may have are no secret, and each chunk is checked by whoever asked for it. In a network
of ten gigabits encryption and the event loop would be most of the work. So two threads copy, which hold the
interpreter only between chunks. Who has the token was given it over an authenticated stream. A wrong chunk
proves nothing here, since anybody on the way can change it: it is asked for again over such a stream.

A request is a file's SHA-256, the first chunk and how many; an answer is the number of bytes that follow,
0 for none. All numbers are big-endian.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from p2pinfer.errors import ModelChanged, PeerVanished
from p2pinfer.models.pieces.chunks import CHUNK_BYTES, ChunkList, ChunkReader

from .messages import MAX_RUN

TOKEN_BYTES: Final = 32
ENTER_S: Final = 10.0  # after a knock, to connect and show the token
_SHOW_S: Final = 2.0  # for a token, once somebody has connected
IDLE_S: Final = 30.0  # that either side may say nothing
_ASK: Final = struct.Struct(">32sII")
_SIZE: Final = struct.Struct(">I")
_AHEAD_S: Final = 0.1  # of a budget that is given out at once

Find: TypeAlias = Callable[[bytes], tuple[Path, ChunkList] | None]  # a file by its SHA-256


class Budget:
    """Bytes a second that some threads share."""

    def __init__(self, bytes_per_s: float) -> None:
        """0 is any number of bytes."""
        self._per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def due_s(self, size: int) -> float:
        """Take so many bytes; returns how long to wait before they may go."""
        if not self._per_s:
            return 0.0
        with self._lock:
            now = time.monotonic()
            wait_s = max(0.0, self._free_at - now - _AHEAD_S)
            self._free_at = max(self._free_at, now) + size / self._per_s
        return wait_s


def open_door(local_ip: str) -> socket.socket:
    """A listening socket at an address of this machine, and a port that was free.

    Raises:
        OSError: There is no such address any more.
    """
    family = socket.AF_INET6 if ":" in local_ip else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((local_ip, 0))
        listener.listen(4)
    except OSError:
        listener.close()
        raise
    return listener


class PlainSender:
    """One connection's sending side. `run` is for a thread of its own, and `close` ends it from any other."""

    def __init__(self, listener: socket.socket, token: bytes, find: Find, budget: Budget) -> None:
        self._sockets = [listener]
        self._token = token
        self._find = find
        self._budget = budget
        self._closed = False

    def run(self) -> int:
        """Wait for who has the token and give what is asked for; returns the bytes that were sent."""
        try:
            with contextlib.closing(self._sockets[0]) as listener:
                connection = self._welcome(listener)
            return 0 if connection is None else self._serve(connection)
        except (OSError, ModelChanged):  # gone, closed, or not what it was: the asker sees the end
            return 0
        finally:
            self.close()

    def close(self) -> None:
        """End the connection. Harmless twice."""
        self._closed = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _welcome(self, listener: socket.socket) -> socket.socket | None:
        until = time.monotonic() + ENTER_S
        while (left := until - time.monotonic()) > 0 and not self._closed:
            listener.settimeout(left)
            connection, _ = listener.accept()
            self._sockets.append(connection)
            connection.settimeout(_SHOW_S)
            with contextlib.suppress(OSError):
                shown = _exactly(connection, TOKEN_BYTES)
                if hmac.compare_digest(shown, self._token):
                    return connection
            connection.close()
        return None

    def _serve(self, connection: socket.socket) -> int:
        connection.settimeout(IDLE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sent = 0
        while asked := _exactly(connection, _ASK.size, may_end=True):
            sha256, first, count = _ASK.unpack(asked)
            found = self._find(sha256)
            if found is None or not 1 <= count <= MAX_RUN or first + count > len(found[1]):
                connection.sendall(_SIZE.pack(0))
                continue
            path, chunks = found
            connection.sendall(_SIZE.pack(sum(map(chunks.bytes_of, range(first, first + count)))))
            with contextlib.closing(ChunkReader(path, chunks)) as reader:
                for index in range(first, first + count):
                    content = reader.read(index)
                    time.sleep(self._budget.due_s(len(content)))
                    connection.sendall(content)
                    sent += len(content)
        return sent


class PlainReceiver:
    """One connection's receiving side, for one thread; `close` ends it from any other."""

    def __init__(self, address: tuple[str, int], token: bytes) -> None:
        """Nothing is connected yet."""
        self._address = address
        self._token = token
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        """Connect and show the token.

        Raises:
            OSError: There is no way to that port.
        """
        self._socket = socket.create_connection(self._address, timeout=_SHOW_S)
        self._socket.settimeout(IDLE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(self._token)

    def ask(self, sha256: bytes, first: int, count: int) -> None:
        """Ask for some chunks; several requests may be under way.

        Raises:
            OSError: The connection is gone.
        """
        assert self._socket is not None
        self._socket.sendall(_ASK.pack(sha256, first, count))

    def receive(
        self, chunks: ChunkList, first: int, count: int, take: Callable[[int, memoryview], None]
    ) -> None:
        """Receive what was asked for, and hand out each chunk as it is there, unchecked.

        Raises:
            PeerVanished: The connection is gone, or the peer has it no more.
        """
        assert self._socket is not None
        buffer = bytearray(CHUNK_BYTES)
        try:
            (size,) = _SIZE.unpack(_exactly(self._socket, _SIZE.size))
            if size != sum(map(chunks.bytes_of, range(first, first + count))):
                raise PeerVanished("has no such chunks any more")
            for index in range(first, first + count):
                with memoryview(buffer) as view, view[: chunks.bytes_of(index)] as part:
                    _fill(self._socket, part)
                    take(index, part)
        except OSError as exc:
            raise PeerVanished(f"the plain connection ended: {exc}") from exc

    def close(self) -> None:
        """End the connection. Harmless twice, and before there is one."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()


def _exactly(connection: socket.socket, size: int, *, may_end: bool = False) -> bytes:
    content, filled = bytearray(size), 0
    with memoryview(content) as view:
        if may_end:
            filled = connection.recv_into(view)
            if not filled:
                return b""
        _fill(connection, view[filled:])
    return bytes(content)


def _fill(connection: socket.socket, view: memoryview) -> None:
    filled = 0
    while filled < len(view):
        received = connection.recv_into(view[filled:])
        if not received:
            raise ConnectionResetError("the peer ended the connection")
        filled += received
