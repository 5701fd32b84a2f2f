"""Load on the HTTP API, over three nodes of the bundled model on this computer.

    python benchmarks/serve.py                           # a table on standard error, JSON on standard output
    python benchmarks/serve.py --parts streams,hang-ups  # some parts alone

Parts, each through `p2pinfer serve` as a process of its own unless it says otherwise:

- door: milliseconds from a request to its first token, more than those of a `Client` in the same process, by
  turns; and processor time of the API per token, as a share of the time that a token takes at one stream;
- ready: seconds from the start of the command until it serves, beside those of a program with a `Client`;
- streams: 64 at once; tokens that were lost, and the slowest stream's speed over the fastest one's;
- idle: kilobytes of the server's memory per idle connection;
- hang-ups: seconds after 200 clients went away at once, in the middle, until no node has a session any more.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import trio

from p2pinfer.api.app import App
from p2pinfer.api.config import ApiConfig
from p2pinfer.api.http_server import serve_http
from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig

PARTS = ("door", "ready", "streams", "idle", "hang-ups")
STREAMS, STREAM_TOKENS = 64, 48
IDLE = 400
HANG_UPS, HANG_UP_TOKENS = 200, 900
TURNS, WARM_UPS = 25, 2
DOOR_TURNS, DOOR_TOKENS = 5, 200
STARTS = 3
POLL_S = 0.05  # asking costs the nodes milliseconds
STREAM_END = 100  # bytes in which the last event of a stream is
EOS = "2"  # of the bundled model, as a request names a token
CLIENT = """
import json, sys, trio, p2pinfer

async def main():
    async with p2pinfer.Client(bootstrap=sys.argv[2:], data_dir=sys.argv[1]) as client:
        assert await client.is_served(30)
        print(json.dumps({"event": "ready"}), flush=True)
        await trio.sleep_forever()

trio.run(main)
"""
SPANS = ("0:3", "3:5", "5:8")
PROMPT = "Once upon a time"


class Lines:
    """JSON objects that a process prints, line by line."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._held = b""

    async def until(self, event: str) -> dict[str, Any]:
        """The next one that tells of such an event."""
        assert self.process.stdout is not None
        while True:
            while b"\n" not in self._held:
                if not (received := await self.process.stdout.receive_some()):
                    raise SystemExit(f"{self.process.args} ended before it was {event}")
                self._held += received
            line, _, self._held = self._held.partition(b"\n")
            if (told := json.loads(line))["event"] == event:
                return told


@asynccontextmanager
async def started(*argv: str) -> AsyncGenerator[Lines]:
    """A command of p2pinfer, or a program behind `-c`, which ends with the block."""
    command = [sys.executable, *(argv if argv[0] == "-c" else ("-m", "p2pinfer", *argv))]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Lines(process)
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()


async def seconds_until_ready(*argv: str) -> float:
    """Time from the start of such a command until it is ready."""
    began = time.perf_counter()
    async with started(*argv) as lines:
        await lines.until("ready")
        return time.perf_counter() - began


@asynccontextmanager
async def nodes(home: Path) -> AsyncGenerator[tuple[list[str], list[int]]]:
    """Three nodes; gives the first one's addresses and the ports of their metrics."""
    addrs: list[str] = []
    ports = [_free_port() for _ in SPANS]
    async with trio.open_nursery() as nursery:
        for index, span in enumerate(SPANS):
            argv = ["node", "--json", "--blocks", span, "--data-dir", str(home / str(index))]
            argv += ["--listen", "/ip4/127.0.0.1/tcp/0", "--metrics-port", str(ports[index])]
            argv += ["--set", "compute.threads=1", "--set", "host.mdns=false"]
            for address in addrs:
                argv += ["--bootstrap", address]
            told = await nursery.start(_keep, argv)
            addrs = addrs or told["addrs"]
        yield addrs, ports
        nursery.cancel_scope.cancel()


async def _keep(argv: Sequence[str], task_status: trio.TaskStatus[dict[str, Any]]) -> None:
    async with started(*argv) as lines:
        task_status.started(await lines.until("ready"))
        assert lines.process.stdout is not None
        async for _ in lines.process.stdout:
            pass  # read on, or a full pipe would stop it


def _free_port() -> int:
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def sessions(ports: Sequence[int]) -> int:
    """Sessions that the nodes have."""
    found = 0
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            found += int(float(re.findall(rb"^p2pinfer_sessions (\S+)", answer.read(), re.MULTILINE)[0]))
    return found


def request(tokens: int) -> bytes:
    """A stream of exactly so many tokens: the one that ends a text is forbidden."""
    body = json.dumps(
        {
            "model": "tiny-stories",
            "prompt": PROMPT,
            "max_tokens": tokens,
            "stream": True,
            "temperature": 0,
            "logit_bias": {EOS: -100},
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def begin(port: int, tokens: int) -> tuple[trio.SocketStream, bytes]:
    """A stream whose first token is there, and what of it has come."""
    client = await trio.open_tcp_stream("127.0.0.1", port)
    await client.send_all(request(tokens))
    received = b""
    while b"data: " not in received:
        if not (more := await client.receive_some()):
            raise SystemExit(f"a stream was cut: {received[-500:]!r}")
        received += more
    return client, received


async def stream(port: int, tokens: int) -> tuple[float, float, int]:
    """One stream: seconds to the first token, seconds in all, and tokens by its usage."""
    began = time.perf_counter()
    client, received = await begin(port, tokens)
    first = time.perf_counter() - began
    async with client:
        while b"[DONE]" not in received[-STREAM_END:]:
            if not (more := await client.receive_some()):
                raise SystemExit(f"a stream was cut: {received[-500:]!r}")
            received += more
    usage = re.findall(rb'"completion_tokens":(\d+)', received)
    return first, time.perf_counter() - began, int(usage[-1])


async def measure_streams(port: int) -> dict[str, Any]:
    """Fairness among many streams at once, and whether all that was asked for came."""
    speeds: list[float] = []
    lost = 0

    async def one() -> None:
        nonlocal lost
        first, whole, tokens = await stream(port, STREAM_TOKENS)
        lost += STREAM_TOKENS - tokens
        speeds.append((tokens - 1) / (whole - first))

    await stream(port, 4)
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(one)
    total = STREAMS * STREAM_TOKENS / (time.perf_counter() - began)
    return {"streams_lost": lost, "streams_fair": min(speeds) / max(speeds), "streams_tokens_per_s": total}


async def measure_idle(port: int, server: psutil.Process) -> dict[str, Any]:
    """Memory per connection that has asked once and now waits."""

    async def opened() -> trio.SocketStream:
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await client.send_all(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await client.receive_some()
        return client

    for _ in range(20):  # what the first ones cost is not theirs
        await (await opened()).aclose()
    await trio.sleep(0.5)
    before = server.memory_info().rss
    clients = [await opened() for _ in range(IDLE)]
    await trio.sleep(0.5)
    after = server.memory_info().rss
    for client in clients:
        await client.aclose()
    return {"idle_kb_per_connection": (after - before) / IDLE / 1e3}


async def measure_hang_ups(port: int, ports: Sequence[int]) -> dict[str, Any]:
    """Seconds until no hop has a session, after all clients have gone in the middle of their streams."""
    clients: list[trio.SocketStream] = []

    async def one() -> None:
        client, _ = await begin(port, HANG_UP_TOKENS)
        clients.append(client)

    async with trio.open_nursery() as nursery:
        for _ in range(HANG_UPS):
            nursery.start_soon(one)
    begun = await trio.to_thread.run_sync(sessions, ports)
    if begun != HANG_UPS * len(ports):
        raise SystemExit(f"the nodes have {begun} sessions; so some texts have ended before their clients go")
    for client in clients:
        client.socket.close()  # all at once
    gone = time.perf_counter()
    while await trio.to_thread.run_sync(sessions, ports):
        if time.perf_counter() - gone > 60:
            raise SystemExit("sessions are left a minute later")
        await trio.sleep(POLL_S)
    return {"hang_ups_s": time.perf_counter() - gone}


async def measure_door(addrs: Sequence[str], home: Path) -> dict[str, Any]:
    """A `Client` and the API over it, in this process, by turns."""
    config = ApiConfig(port=0)
    async with Client(
        bootstrap=addrs,
        data_dir=home / "client",
        config=ClientConfig(speculate="off", draft="off"),
        audit=AuditConfig(rate=0.0),
    ) as client:
        await client.is_served(10)
        app = App([client], config)
        async with trio.open_nursery() as nursery:
            ((_, port),) = await nursery.start(serve_http, app.handle, config)
            told = {**await _first_tokens(client, port), **await _processor_time(client, port)}
            nursery.cancel_scope.cancel()
    return told


async def _first_tokens(client: Client, port: int) -> dict[str, Any]:
    direct: list[float] = []
    through: list[float] = []
    for turn in range(TURNS + WARM_UPS):
        began = time.perf_counter()
        async with client.generate(PROMPT, max_new_tokens=2, temperature=0) as generation:
            await anext(generation)
            first = time.perf_counter() - began
        told, _, _ = await stream(port, 2)
        if turn >= WARM_UPS:
            direct.append(first)
            through.append(told)
    return {
        "client_first_token_ms": median(direct) * 1e3,
        "first_token_later_ms": (median(through) - median(direct)) * 1e3,
    }


async def _processor_time(client: Client, port: int) -> dict[str, Any]:
    """Processor time of this process per token: that of its HTTP client counts as the API's."""
    direct_cpu: list[float] = []
    direct: list[float] = []
    through_cpu: list[float] = []
    for _ in range(DOOR_TURNS):
        cpu, began = time.process_time(), time.perf_counter()
        generation = client.generate(
            PROMPT, max_new_tokens=DOOR_TOKENS, temperature=0, logit_bias={int(EOS): -100}
        )
        async with generation:
            async for _ in generation:
                pass
        direct_cpu.append((time.process_time() - cpu) / DOOR_TOKENS)
        direct.append((time.perf_counter() - began) / DOOR_TOKENS)
        cpu = time.process_time()
        _, _, count = await stream(port, DOOR_TOKENS)
        through_cpu.append((time.process_time() - cpu) / count)
    return {
        "token_ms": median(direct) * 1e3,
        "door_us_per_token": (median(through_cpu) - median(direct_cpu)) * 1e6,
        "door_share_of_token": (median(through_cpu) - median(direct_cpu)) / median(direct),
    }


async def measure_ready(addrs: Sequence[str], home: Path, serve: Sequence[str]) -> dict[str, Any]:
    """The command, and a program with a client, from the start of their processes."""
    program = ("-c", CLIENT, str(home / "program"), *addrs)
    ready = [(await seconds_until_ready(*program), await seconds_until_ready(*serve)) for _ in range(STARTS)]
    return {
        "client_ready_s": median(client for client, _ in ready),
        "serve_ready_s": median(serve for _, serve in ready),
    }


def serve_command(addrs: Sequence[str], home: Path) -> list[str]:
    """`p2pinfer serve` in the swarm of these nodes, which lets one key have all streams at once."""
    argv = ["serve", "--json", "--port", "0", "--data-dir", str(home / "serve"), "--policy", "fastest"]
    argv += ["--set", "audit.rate=0.0", "--set", f"api.requests_per_key={HANG_UPS}"]
    return argv + [word for address in addrs for word in ("--bootstrap", address)]


async def main(parts: Sequence[str]) -> None:
    """Measure, and print."""
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        async with nodes(home) as (addrs, ports):
            argv = serve_command(addrs, home)
            if "door" in parts:
                measured |= await measure_door(addrs, home)
            if "ready" in parts:
                measured |= await measure_ready(addrs, home, argv)
            async with started(*argv) as serve:
                port = int((await serve.until("ready"))["urls"][0].rpartition(":")[2])
                if "idle" in parts:  # first, since memory that streams gave back would be used again
                    measured |= await measure_idle(port, psutil.Process(serve.process.pid))
                if "streams" in parts:
                    measured |= await measure_streams(port)
                if "hang-ups" in parts:
                    measured |= await measure_hang_ups(port, ports)
    for name, value in measured.items():
        print(f"{name:28}{value:10.3f}", file=sys.stderr)
    print(json.dumps(measured))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="those to measure, separated by commas")
    wanted = parser.parse_args().parts.split(",")
    if unknown := set(wanted) - {*PARTS}:
        parser.error(f"there is no part {min(unknown)}; there are {', '.join(PARTS)}")
    trio.run(main, wanted)
