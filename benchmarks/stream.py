"""What a message costs on a long-lived stream: p2pinfer's against libp2p's own and against bare TCP.

Two processes on loopback, one echoes. Each size is measured on all three in turn, several rounds over, so
that a change in the machine's load hits them alike. `python benchmarks/stream.py [--json]`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from statistics import median, quantiles
from typing import Any

import trio
from libp2p import new_host
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr
from quotient import spread

from p2pinfer.node.host.host import HostConfig, open_host
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.node.transport.peer_stream import PeerStream

PROTOCOL = "/p2pinfer/benchmark/1.0.0"
LISTEN = "/ip4/127.0.0.1/tcp/0"
SIZES = (64, 4096, 16384, 65536)
STACKS = ("tcp", "libp2p", "p2pinfer")
BULK_BYTES = 64 << 20

Send = Callable[[bytes], Awaitable[None]]
Receive = Callable[[], Awaitable[bytes]]


def bare_libp2p() -> Any:
    """A libp2p host as it comes, but for plaintext."""
    key_pair = new_identity().key_pair
    noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=key_pair, sec_opt={NOISE: noise})


async def echo(receive: Receive, send: Send) -> None:
    while received := await receive():
        await send(received)


async def serve() -> None:
    """Echo on all three until standard input ends."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        host = await stack.enter_async_context(open_host(new_identity(), HostConfig(listen=(LISTEN,))))
        plain = bare_libp2p()
        await stack.enter_async_context(plain.run([Multiaddr(LISTEN)]))

        async def answer_peer(stream: PeerStream) -> None:
            await echo(stream.receive_some, stream.send_all)

        async def answer_plain(stream: Any) -> None:
            await echo(lambda: stream.read(65536), stream.write)

        async def answer_tcp(stream: trio.SocketStream) -> None:
            stream.setsockopt(6, 1, 1)
            await echo(stream.receive_some, stream.send_all)

        host.serve(PROTOCOL, answer_peer)
        plain.set_stream_handler(TProtocol(PROTOCOL), answer_plain)
        listeners = await nursery.start(trio.serve_tcp, answer_tcp, 0)
        print(
            json.dumps(
                {
                    "port": listeners[0].socket.getsockname()[1],
                    "peer_id": host.peer_id,
                    "addrs": host.addrs,
                    "plain_id": str(plain.get_id()),
                    "plain_addr": str(plain.get_transport_addrs()[0]),
                }
            ),
            flush=True,
        )
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


async def round_trip(send: Send, receive: Receive, message: bytes) -> float:
    """Milliseconds until all of `message` is back."""
    started = time.perf_counter()
    await send(message)
    missing = len(message)
    while missing:
        missing -= len(await receive())
    return (time.perf_counter() - started) * 1e3


async def bulk(send: Send, receive: Receive) -> float:
    """Megabytes a second, there and back."""
    started = time.perf_counter()
    async with trio.open_nursery() as nursery:

        async def push() -> None:
            for _ in range(BULK_BYTES >> 18):
                await send(bytes(1 << 18))

        nursery.start_soon(push)
        missing = BULK_BYTES
        while missing:
            missing -= len(await receive())
    return BULK_BYTES / (time.perf_counter() - started) / 1e6


async def measure(there: dict[str, Any], rounds: int, messages: int) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(open_host(new_identity(), HostConfig(listen=())))
        plain = bare_libp2p()
        await stack.enter_async_context(plain.run([]))
        tcp = await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", there["port"]))
        tcp.setsockopt(6, 1, 1)
        stream = await host.open_stream(there["peer_id"], PROTOCOL, there["addrs"])
        plain_id = ID.from_base58(there["plain_id"])
        await plain.get_network().dial_addr(Multiaddr(there["plain_addr"]), plain_id)
        plain_stream: Any = await plain.new_stream(plain_id, [TProtocol(PROTOCOL)])
        ways: dict[str, tuple[Send, Receive]] = {
            "tcp": (tcp.send_all, tcp.receive_some),
            "libp2p": (plain_stream.write, lambda: plain_stream.read(65536)),
            "p2pinfer": (stream.send_all, stream.receive_some),
        }
        times: dict[str, dict[int, list[float]]] = {each: {size: [] for size in SIZES} for each in STACKS}
        rates: dict[str, list[float]] = {each: [] for each in STACKS}
        opening: list[float] = []
        for _ in range(rounds):
            for size in SIZES:
                for name in STACKS:
                    times[name][size] += [await round_trip(*ways[name], bytes(size)) for _ in range(messages)]
            for name in STACKS:
                rates[name].append(await bulk(*ways[name]))
            for _ in range(10):
                started = time.perf_counter()
                async with await host.open_stream(there["peer_id"], PROTOCOL):
                    opening.append((time.perf_counter() - started) * 1e3)
        return {
            "rtt_ms": {
                name: {
                    size: {"median": median(sample), "p99": quantiles(sample, n=100)[98]}
                    for size, sample in sizes.items()
                }
                for name, sizes in times.items()
            },
            "echo_mb_per_s": {name: median(sample) for name, sample in rates.items()},
            "echo_rounds": {name: spread(sample, 0) for name, sample in rates.items()},
            "open_stream_ms": median(opening),
        }


def report(result: dict[str, Any]) -> None:
    rtt = result["rtt_ms"]
    print(f"{'round trip, ms':>16}" + "".join(f"{name:>20}" for name in STACKS) + f"{'p2pinfer/tcp':>14}")
    for size in SIZES:
        cells = "".join(
            f"{rtt[name][size]['median']:12.3f} /{rtt[name][size]['p99']:6.2f}" for name in STACKS
        )
        ratio = rtt["p2pinfer"][size]["median"] / rtt["tcp"][size]["median"]
        print(f"{size:>10} bytes" + cells + f"{ratio:14.1f}")
    rates, spreads = result["echo_mb_per_s"], result["echo_rounds"]
    print(f"{'64 MB, MB/s':>16}" + "".join(f"{rates[name]:20.0f}" for name in STACKS))
    print(f"{'of the rounds':>16}" + "".join(f"{spreads[name]:>20}" for name in STACKS))
    print(
        f"open_stream {result['open_stream_ms']:.2f} ms   (median / 99th percentile; {platform.platform()})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=300, help="per size, stack and round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(serve)
        return
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin and server.stdout
    try:
        there = json.loads(server.stdout.readline())
        result = trio.run(measure, there, arguments.rounds, arguments.messages)
    finally:
        server.stdin.close()
        server.wait(10)
    print(json.dumps(result)) if arguments.json else report(result)


if __name__ == "__main__":
    main()
