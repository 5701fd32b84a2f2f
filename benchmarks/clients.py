"""Eight clients at once on one node, against one client alone.

    python benchmarks/clients.py                                  # bfloat16: 512x8, 1024x16, SmolLM2
    python benchmarks/clients.py --model 1024x16 --clients 1 2 4 8 16

Every client is a process of its own with one torch thread, and runs embedding and head itself; all share
this machine's cores with the node. The node is measured with one thread, and with one per core, as
`p2pinfer node` starts it. A figure is the tokens of all clients over the time from the first one's
start to the last one's end. `fair` is the slowest client's speed over the fastest one's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # oneDNN reads it once, here and in the nodes

import torch
import trio
from contest import (
    MODELS,
    blocks_of,
    evenly,
    model_folder,
    open_swarm,
    open_walk,
    prompt_ids,
    report,
    rounded,
)
from quotient import spread

from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import AuditConfig

PROMPT = 32


async def contest(
    folder: Path, addrs: Sequence[str], dtype: str, device: str, clients: int, tokens: int, rounds: int
) -> Any:
    """Per round: all clients' tokens per second together, and the slowest's share of the fastest's."""
    command = [sys.executable, __file__, "--as-client", str(folder), dtype, device, str(tokens), *addrs]
    processes = [
        await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(clients)
    ]
    lines = [_Lines(process) for process in processes]
    for each in lines:
        await each.next()  # it is connected and warm
    together: list[float] = []
    fair: list[float] = []
    for _ in range(rounds + 1):
        for process in processes:
            assert process.stdin is not None
            await process.stdin.send_all(b"go\n")
        times = [json.loads(await each.next()) for each in lines]
        seconds = max(end for _, end in times) - min(start for start, _ in times)
        together.append(clients * tokens / seconds)
        speeds = [1 / (end - start) for start, end in times]
        fair.append(min(speeds) / max(speeds))
    for process in processes:
        assert process.stdin is not None
        await process.stdin.aclose()
        await process.wait()
    return together[1:], fair[1:]


class _Lines:
    """What a process prints, line by line."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""

    async def next(self) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            received = await self._process.stdout.receive_some()
            if not received:
                raise SystemExit("a client ended early")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


async def be_client(folder: str, dtype: str, device: str, tokens: str, *addrs: str) -> None:
    """One client: says it is ready, then generates whenever told to, and prints when it began and ended."""
    torch.set_num_threads(1)
    ids = prompt_ids(PROMPT)
    config = ClientConfig(dtype=dtype, device=device, find_timeout_s=60)
    audit = AuditConfig(rate=0.0)  # see `open_swarm`
    async with Client(model=folder, bootstrap=addrs, config=config, audit=audit) as client:
        warm = False
        while not warm or await trio.to_thread.run_sync(sys.stdin.readline):
            async with open_walk(client, PROMPT + int(tokens)) as walk:
                _, times = await walk.generate(ids, int(tokens) if warm else 4)
            print(json.dumps([times[0], times[-1]]), flush=True)
            warm = True


async def measure(
    name: str,
    folder: Path,
    dtype: str,
    device: str,
    counts: Sequence[int],
    tokens: int,
    threads: int = 1,
    rounds: int = 5,
) -> list[dict[str, Any]]:
    """The rows of one model and one number of threads in the node."""
    rows: list[dict[str, Any]] = []
    async with open_swarm(folder, evenly(blocks_of(folder), 1), dtype, device, threads) as client:
        addrs = client.peers()[0].announcement.addrs
        for count in counts:
            together, fair = await contest(folder, addrs, dtype, device, count, tokens, rounds)
            alone = rows[0]["tok/s"] if rows else rounded(together)
            rows.append(
                {
                    "model": name,
                    "dtype": dtype,
                    "node threads": threads,
                    "clients": count,
                    "tok/s": rounded(together),
                    "times one": round(rounded(together) / alone, 2),
                    "rounds": spread([each / alone for each in together]),
                    "fair": rounded(fair),
                }
            )
    return rows


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.model:
        with model_folder(name) as folder:
            for dtype, threads in itertools.product(options.dtype, options.threads):
                rows += await measure(
                    name, folder, dtype, "cpu", options.clients, options.tokens, threads, options.rounds
                )
    report("clients at once on one node", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-client"]:
        trio.run(be_client, *sys.argv[2:])
    else:
        trio.run(main)
