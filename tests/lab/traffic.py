"""Plain sockets in a host of a lab, for tests of the lab itself: `python -m tests.lab.traffic WHAT ...`.

Servers print `ready` once they listen; clients print one JSON value. A datagram is answered with the address
it seemed to come from, so that a client learns how routers translated it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

SILENCE_S = 1.0  # after which nothing more is expected


def main(argv: list[str]) -> None:
    """Run one of the functions below, by name, with numbers where it wants them."""
    known: dict[str, Callable[..., Any]] = {
        "echo": echo,
        "sink": sink,
        "ask": ask,
        "upload": upload,
        "dial": dial,
        "meet": meet,
    }
    told = known[argv[0]](*(int(word) if word.isdigit() else word for word in argv[1:]))
    print(json.dumps(told), flush=True)


def echo(port: int) -> None:
    """Answer every datagram with the sender's address and port, and then its content."""
    with _bound(socket.SOCK_DGRAM, port) as server:
        print("ready", flush=True)
        while True:
            content, sender = server.recvfrom(2048)
            seen = str(sender[0]).removeprefix("::ffff:")
            server.sendto(f"{seen} {sender[1]} ".encode() + content, sender)


def sink(port: int) -> None:
    """Read every connection to its end, and answer with who it seemed to be, the bytes and the seconds."""
    with _bound(socket.SOCK_STREAM, port) as server:
        server.listen()
        print("ready", flush=True)
        while True:
            connection, sender = server.accept()
            with connection, contextlib.suppress(OSError):
                begun, count = 0.0, 0
                while piece := connection.recv(1 << 16):
                    begun = begun or time.monotonic()
                    count += len(piece)
                seconds = time.monotonic() - begun
                seen = str(sender[0]).removeprefix("::ffff:")
                connection.sendall(json.dumps([seen, sender[1], count, seconds]).encode())


def ask(host: str, port: int, source: int, count: int, size: int = 32, per_second: int = 100) -> list[Any]:
    """Send datagrams from a port; (address, port, seconds there and back) for every answer."""
    answers: list[Any] = []
    with _bound(socket.SOCK_DGRAM, source, host) as client:
        client.settimeout(0)
        sent_at: list[float] = []
        until = time.monotonic() + count / per_second + SILENCE_S
        while time.monotonic() < until and len(answers) < count:
            if len(sent_at) < count and (not sent_at or time.monotonic() >= sent_at[-1] + 1 / per_second):
                datagram = str(len(sent_at)).encode().ljust(size)
                sent_at.append(time.monotonic())  # or it could be on its way before that
                client.sendto(datagram, (host, port))
            with contextlib.suppress(BlockingIOError):
                seen, seen_port, number = client.recv(2048).split()[:3]
                answers.append((seen.decode(), int(seen_port), time.monotonic() - sent_at[int(number)]))
            time.sleep(0.0005)
    return answers


def upload(host: str, port: int, source: int, size: int) -> Any:
    """Send so many bytes over TCP from a port, and hand on what `sink` says about it."""
    with _bound(socket.SOCK_STREAM, source, host) as client:
        client.settimeout(20)
        client.connect((host, port))
        client.sendall(bytes(size))
        client.shutdown(socket.SHUT_WR)
        return json.loads(client.recv(1024))


def dial(host: str, port: int) -> str:
    """What becomes of a TCP connection: connected, refused, silent or unreachable."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as client:
        client.settimeout(SILENCE_S)
        try:
            client.connect((host, port))
        except TimeoutError:
            return "silent"
        except ConnectionRefusedError:
            return "refused"
        except OSError:
            return "unreachable"
        return "connected"


def meet(host: str, port: int, seconds: int) -> str:
    """Dial over and over from the port that is dialled, as hole punching does: connected, or the error."""
    until = time.monotonic() + seconds
    error = "silent"
    while time.monotonic() < until:
        with _bound(socket.SOCK_STREAM, port, host) as client:
            client.settimeout(1)
            try:
                client.connect((host, port))
            except OSError as exc:
                error = str(exc)
                time.sleep(0.02)
                continue
            client.sendall(b"x")
            return "connected" if client.recv(1) == b"x" else "closed"
    return error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bound(kind: socket.SocketKind, port: int, host: str = ":") -> socket.socket:
    made = socket.socket(_family(host), kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if host == ":":
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind(("", port))
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
