"""An upload through a connection of ours, in a host of a lab: `python lossy_upload.py HOST PORT BYTES`.

Prints the congestion control that it ended with. The receiver is `traffic.sink`.
"""

from __future__ import annotations

import logging
import socket
import sys

import trio

from p2pinfer.node.transport.tcp import TcpStream, tune

PIECE_BYTES = 16 << 10


async def main(host: str, port: int, size: int) -> None:
    """Send so many bytes, and print one word."""
    began_at = trio.current_time()
    connection = await trio.open_tcp_stream(host, port)
    took_s = trio.current_time() - began_at
    tune(connection, 30.0)
    stream = TcpStream(connection, 30.0)
    stream.expect_round_trip(took_s)
    for _ in range(size // PIECE_BYTES):
        await stream.write(bytes(PIECE_BYTES))
    control = stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    print(control.rstrip(b"\0").decode(), flush=True)
    await stream.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
