"""Weights between peers on loopback, beside plain copies of the same bytes in the same run.

    python benchmarks/peer_weights.py --mib 1024

A process that holds the files, and one that has none. Rates are those of the same bytes, in turns:

- a copy of the file by `cp`;
- a plain copy: one TCP connection, a process that reads and sends, one that receives and writes;
- the same, with the SHA-256 of what was written at the end, which every download has to have;
- weights from one peer and from two over plain connections, each chunk checked, the whole file checked;
- the same over encrypted streams (`weights.plain` is false), as beyond a local network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import trio
from quotient import spread

from p2pinfer.models.pieces.chunks import list_chunks
from p2pinfer.models.pieces.manifest import Holdings, Manifest, WeightFile
from p2pinfer.node.host.host import HostConfig, open_host
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.weights.config import WeightsConfig
from p2pinfer.node.weights.file_job import Source
from p2pinfer.node.weights.weights_fetch import WeightsFetch
from p2pinfer.node.weights.weights_server import WeightsServer

PIECE = 1 << 20
FAST = 1 << 40  # bytes a second


async def hold(path: Path, sha256: str, cache: Path) -> None:
    """Give the file away until standard input ends."""
    async with open_host(new_identity(), HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as host:
        config = WeightsConfig(share="all", lan_bytes_per_s=FAST, upload_bytes_per_s=FAST)
        server = WeightsServer(host, config, cache)
        file = WeightFile(path.name, path.stat().st_size, sha256)
        manifest = Manifest("random", "{}", (file,), ())
        server.offer(Holdings(manifest, {path.name: path}, path.parent))
        server.register()
        print(json.dumps([host.peer_id, host.addrs]), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


def send(path: Path, port: int) -> None:
    """What a plain copy sends."""
    buffer = bytearray(PIECE)
    with socket.create_connection(("127.0.0.1", port)) as connection, path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            connection.sendall(memoryview(buffer)[:count])


def plain_copy(path: Path, target: Path, *, checked: bool) -> float:
    """Seconds to receive a copy over one connection, and to hash it if that is asked for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        sender = subprocess.Popen([sys.executable, __file__, "--send", str(path), port])
        connection, _ = listener.accept()
        started = time.perf_counter()
        buffer = bytearray(PIECE)
        with connection, target.open("wb", buffering=0) as file:
            while count := connection.recv_into(buffer):
                file.write(memoryview(buffer)[:count])
        if checked:
            with target.open("rb") as file:
                hashlib.file_digest(file, "sha256")
        seconds = time.perf_counter() - started  # without the sender's start
        sender.wait()
    return seconds


class Holders:
    """Processes that hold the file."""

    def __init__(self, count: int, path: Path, sha256: str, folder: Path) -> None:
        options = ["--hold", str(path), sha256, str(folder)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        self.sources: list[tuple[str, list[str]]] = []

    def __enter__(self) -> Holders:
        for each in self._processes:
            assert each.stdout is not None
            self.sources.append(json.loads(each.stdout.readline()))
        return self

    def __exit__(self, *exc: object) -> None:
        for each in self._processes:
            assert each.stdin is not None
            each.stdin.close()
            each.wait(20)


async def bring(
    sources: list[tuple[str, list[str]]], file: WeightFile, target: Path, cache: Path, plain: bool
) -> float:
    """Seconds until the file is here and known to be right."""
    config = WeightsConfig(plain=plain)
    async with open_host(new_identity(), HostConfig(listen=())) as host:

        async def find() -> list[Source]:
            return [Source(peer_id, tuple(addrs)) for peer_id, addrs in sources]

        fetch = WeightsFetch(host, config, cache, find)
        for peer_id, addrs in sources:
            await host.connect(peer_id, addrs)
        started = time.perf_counter()
        await fetch.bring([file], target)
        assert len(fetch.brought.bytes) == len(sources) and not fetch.brought.liars
        return time.perf_counter() - started


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    path = folder / "random.safetensors"
    with path.open("wb") as file:
        for _ in range(options.mib):
            file.write(os.urandom(PIECE))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    cache = folder / "cache"
    list_chunks(path, sha256, cache)
    file_entry = WeightFile(path.name, path.stat().st_size, sha256)
    target = folder / "target"
    target.mkdir()
    copy = target / path.name

    def over(count: int, plain: bool) -> Callable[[], float]:
        def run() -> float:
            chosen = holders.sources[:count]
            return trio.run(bring, chosen, file_entry, target, folder / f"cache-{time.time()}", plain)

        return run

    def cp() -> float:
        started = time.perf_counter()
        subprocess.run(["cp", str(path), str(copy)], check=True)
        return time.perf_counter() - started

    ways: dict[str, Callable[[], float]] = {
        "cp": cp,
        "plain copy": partial(plain_copy, path, copy, checked=False),
        "plain copy and SHA-256": partial(plain_copy, path, copy, checked=True),
        "two peers, plain": over(2, True),
        "one peer, plain": over(1, True),
        "one peer, encrypted": over(1, False),
        "two peers, encrypted": over(2, False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Holders(2, path, sha256, cache) as holders:
        for _ in range(options.rounds):
            for name, run in ways.items():
                copy.unlink(missing_ok=True)
                seconds[name].append(run())
    size = path.stat().st_size / 1e6
    rates = {name: [size / each for each in sample] for name, sample in seconds.items()}
    return [
        {
            "way": name,
            "MB/s": round(median(sample)),
            "rounds": spread(sample, 0),
            "of the plain copy": round(median(sample) / median(rates["plain copy"]), 2),
            "of the checked copy": round(median(sample) / median(rates["plain copy and SHA-256"]), 2),
        }
        for name, sample in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files lie; /dev/shm leaves the disk out")
    parser.add_argument("--hold", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--send", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        send(Path(options.send[0]), int(options.send[1]))
        return
    if options.hold:
        path, sha256, cache = options.hold
        trio.run(hold, Path(path), sha256, Path(cache))
        return
    from contest import report  # torch, which the processes that send need not load

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(options, Path(folder))
    report(f"{options.mib} MiB on loopback, {platform.machine()}, {os.cpu_count()} cores", rows)


if __name__ == "__main__":
    main()
