"""The internet between the sites: one process that reads TUN devices and gives every line its character.

A packet waits for its turn on the sender's line, travels that line's delay, then waits for its turn on the
receiver's line and travels that one's. Nothing else delays it: the core is infinitely fast.

Reads a JSON object a line from standard input and answers each with one. The first names the sites and makes
their devices, later ones change a line or ask for the counters. Ends when standard input does.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .scenario import Line

MAX_PACKET = 2048
BATCH = 32  # packets read from one device before others have their turn
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


@dataclass(slots=True)
class Counters:
    """What became of a site's packets, in both directions together."""

    carried: int = 0
    carried_bytes: int = 0
    lost: int = 0  # by the line's loss
    overflowed: int = 0  # for want of room in the queue
    unroutable: int = 0  # to nowhere, or malformed


class Way:
    """One direction of a line."""

    def __init__(self, bytes_per_s: float, line: Line, rng: random.Random) -> None:
        self._bytes_per_s = bytes_per_s
        self._line = line
        self._rng = rng
        self._free_at = 0.0  # when the last packet will have been put on the line
        self._last_at = 0.0  # when the last packet will arrive: jitter changes no order

    def accept(self, size: int, now: float, counters: Counters) -> float | None:
        """When a packet of `size` bytes that comes at `now` will be through; None if it is dropped."""
        line = self._line
        if line.loss and self._rng.random() < line.loss:
            counters.lost += 1
            return None
        starts_at = max(now, self._free_at)
        if starts_at - now > line.queue_ms / 1000:
            counters.overflowed += 1
            return None
        self._free_at = starts_at + size / self._bytes_per_s
        arrives_at = self._free_at + (line.delay_ms + line.jitter_ms * self._rng.random()) / 1000
        self._last_at = max(self._last_at, arrives_at)
        return self._last_at


class Internet:
    """Packets on their way between sites. Knows neither devices nor clocks.

    Args:
        lines: By site.
        prefixes: What the destination addresses of a site begin with, 3 bytes of IPv4 or 6 of IPv6.
        rng: Draws losses and jitter.
    """

    def __init__(
        self, lines: dict[str, Line], prefixes: dict[bytes, str], rng: random.Random | None = None
    ) -> None:
        self.counters = {site: Counters() for site in lines}
        self._prefixes = prefixes
        self._rng = rng or random.Random()
        self._up: dict[str, Way] = {}
        self._down: dict[str, Way] = {}
        # (time, order, where it goes, packet, whether it is on the receiver's line already)
        self._under_way: list[tuple[float, int, str, bytes, bool]] = []
        self._order = 0
        for site, line in lines.items():
            self.change(site, line)

    def change(self, site: str, line: Line) -> None:
        """Give a site another line; what is under way arrives as before."""
        self._up[site] = Way(line.up_mbit * 125_000, line, self._rng)
        self._down[site] = Way(line.down_mbit * 125_000, line, self._rng)

    def send(self, source: str, packet: bytes, now: float) -> None:
        """Take a packet from a site."""
        counters = self.counters[source]
        target = self._prefixes.get(destination(packet)) if packet else None
        if target is None or target == source:
            counters.unroutable += 1
            return
        reached_at = self._up[source].accept(len(packet), now, counters)
        if reached_at is not None:
            counters.carried += 1
            counters.carried_bytes += len(packet)
            self._push(reached_at, target, packet, False)

    def due(self, now: float) -> Iterator[tuple[str, bytes]]:
        """The packets that arrive by `now`, and where."""
        while self._under_way and self._under_way[0][0] <= now:
            at, _, site, packet, last_mile = heapq.heappop(self._under_way)
            if last_mile:
                yield site, packet
                continue
            counters = self.counters[site]
            arrives_at = self._down[site].accept(len(packet), at, counters)
            if arrives_at is not None:
                self._push(arrives_at, site, packet, True)

    def next_at(self) -> float | None:
        """When to call `due` again, or None if nothing is under way."""
        return self._under_way[0][0] if self._under_way else None

    def _push(self, at: float, site: str, packet: bytes, last_mile: bool) -> None:
        self._order += 1
        heapq.heappush(self._under_way, (at, self._order, site, packet, last_mile))


def destination(packet: bytes) -> bytes:
    """The leading bytes of where a packet goes: 3 of an IPv4 address, 6 of an IPv6 one; empty if neither."""
    match packet[0] >> 4:
        case 4 if len(packet) >= 20:
            return packet[16:19]
        case 6 if len(packet) >= 40:
            return packet[24:30]
        case _:
            return b""


def open_tun(name: str) -> int:
    """A new TUN device of that name, in this process's network namespace; its file descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor


def main() -> None:
    """Serve until standard input ends."""
    sites: dict[str, Any] = json.loads(sys.stdin.readline())
    lines = {name: Line(**site["line"]) for name, site in sites.items()}
    prefixes = {bytes.fromhex(prefix): name for name, site in sites.items() for prefix in site["prefixes"]}
    internet = Internet(lines, prefixes)
    devices = {name: open_tun(name) for name in sites}
    _answer({"ready": True})
    _carry(internet, devices)


def _carry(internet: Internet, devices: dict[str, int]) -> None:
    sites = {descriptor: name for name, descriptor in devices.items()}
    watched = [*sites, sys.stdin.fileno()]
    while True:
        next_at = internet.next_at()
        timeout = None if next_at is None else max(0.0, next_at - time.monotonic())
        readable, _, _ = select.select(watched, (), (), timeout)
        for descriptor in readable:
            if descriptor in sites:
                _read_some(internet, sites[descriptor], descriptor)
            elif not _obey(internet, os.read(descriptor, 1 << 16)):
                return
        for site, packet in internet.due(time.monotonic()):
            try:
                os.write(devices[site], packet)
            except OSError:  # the site's end is down
                internet.counters[site].unroutable += 1


def _read_some(internet: Internet, site: str, descriptor: int) -> None:
    for _ in range(BATCH):
        try:  # the time is that after the read: a packet must not have come before it was sent
            internet.send(site, os.read(descriptor, MAX_PACKET), time.monotonic())
        except OSError:  # nothing more, or the site's end is down
            return


def _obey(internet: Internet, asked: bytes) -> bool:
    """Do what each line asks for; False at the end. Who asks waits for the answer, so lines come whole."""
    for line in asked.splitlines():
        order = json.loads(line)
        if "site" in order:
            internet.change(order["site"], Line(**order["line"]))
        _answer({site: asdict(counters) for site, counters in internet.counters.items()})
    return bool(asked)


def _answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
