"""People who have nothing to do with a swarm, and count who knocks at their doors.

Their addresses are 127.66.0.1 and so on, which on Linux all lead here: no root is needed, and nothing leaves
the machine. Half of them accept and say nothing, the others hang up.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from p2pinfer.node.transport.addresses import range_of

NETWORKS: Final = 4  # address ranges, /24
HOSTS: Final = 8  # of each
PORTS: Final = 2  # of each
SILENT_S: Final = 15.0  # for which one that says nothing holds the line


@dataclass
class Victims:
    """All of them.

    Attributes:
        addrs: Multiaddrs.
        knocks: (when, at which IP address) somebody connected.
    """

    addrs: tuple[str, ...]
    knocks: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])

    def busiest(self, window_s: float, name: Callable[[str], str] = str) -> float:
        """Most connections a second at one address in any span of so many seconds.

        Args:
            name: What is counted together: of the address itself, or `range_of` it, or "" for all.
        """
        times: dict[str, list[float]] = {}
        for at, ip in self.knocks:
            times.setdefault(name(ip), []).append(at)
        most = 0
        for each in times.values():
            first = 0
            for last, at in enumerate(each):
                while each[first] < at - window_s:
                    first += 1
                most = max(most, last - first + 1)
        return most / window_s

    def busiest_range(self, window_s: float) -> float:
        """The same for an address range."""
        return self.busiest(window_s, range_of)


@contextmanager
def open_victims() -> Generator[Victims]:
    """They listen until the block ends."""
    selector = selectors.DefaultSelector()
    addrs: list[str] = []
    for network in range(NETWORKS):
        for host in range(HOSTS):
            for port in range(PORTS):
                listener = socket.create_server((f"127.66.{network}.{host + 1}", 0), backlog=512)
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ, host % 2 == 0 and port == 0)
                ip, number = listener.getsockname()
                addrs.append(f"/ip4/{ip}/tcp/{number}")
    victims = Victims(tuple(addrs))
    ending = threading.Event()
    thread = threading.Thread(target=_count, args=(selector, victims, ending))
    thread.start()
    try:
        yield victims
    finally:
        ending.set()
        thread.join()
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        selector.close()


def _count(selector: selectors.BaseSelector, victims: Victims, ending: threading.Event) -> None:
    held: list[tuple[float, socket.socket]] = []
    while not ending.is_set():
        for key, _ in selector.select(0.1):
            assert isinstance(key.fileobj, socket.socket)
            try:
                connection, _ = key.fileobj.accept()
            except BlockingIOError:
                continue
            now = time.monotonic()
            victims.knocks.append((now, key.fileobj.getsockname()[0]))
            if key.data:
                held.append((now + SILENT_S, connection))
            else:
                connection.close()
        while held and held[0][0] <= time.monotonic():
            held.pop(0)[1].close()
    for _, connection in held:
        connection.close()
