"""`python -m tests.chaos.endurance`: forty clients that never pause, and what nodes hold after a while.

Three nodes hold the model between them, each block twice. Every client generates one text after the other,
and each text is compared with that of transformers. Prints the nodes' memory once a minute. Exit code 1 if a
text is wrong or missing, if a client gets much less than others, or if a node's memory grows: if the median
of the last quarter of the time is more than `MORE_MIB` above that of the third.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median

import trio

from p2pinfer.client import Client, ClientConfig
from p2pinfer.errors import P2PInferError

from .processes import NodeProcess, Zygote
from .requests import expected_ids, make_requests
from .vitals import resident_mib

SPANS = ((0, 8), (0, 4), (4, 8))
CLIENTS = 40
# In five minutes of twenty. oneDNN keeps a kernel for each weight and each of 36 numbers of rows, and some of
# them come late. What is kept for auditors is full at 4 MiB here (`NodeProcess`).
MORE_MIB = 24.0
LEAST_SHARE = 0.3  # of the median client's texts, where there are enough to count
LOOK_S = 2.0
SAY_S = 60.0
PATIENCE_S = 120.0
# Caches of ended sessions, which fill up for a quarter of an hour by default, would hide other growth.
PREFIX_KEEP_S = 60.0


def grown_mib(samples: Sequence[float]) -> float:
    """How much more the last quarter of the samples held than the third, by their medians."""
    quarter = len(samples) // 4
    return median(samples[-quarter:]) - median(samples[-2 * quarter : -quarter])


def shortcomings(
    held: Mapping[str, Sequence[float]], texts: Mapping[int, int], wrong: Sequence[str]
) -> list[str]:
    """What was promised and not kept.

    Args:
        held: MiB of each node, at equal intervals.
        texts: Right ones of each client.
    """
    found = list(wrong)
    for name, samples in held.items():
        if (grown := grown_mib(samples)) > MORE_MIB:
            found.append(f"{name} has grown by {grown:.0f} MiB")
    usual = median(texts.values())
    found += [
        f"client {client} got {count} texts, others {usual:g}"
        for client, count in texts.items()
        if count < LEAST_SHARE * usual - 3
    ]
    return found


async def _run(nodes: Sequence[NodeProcess], home: Path, clients: int, seconds: float) -> list[str]:
    requests = make_requests()
    expected = await trio.to_thread.run_sync(expected_ids, requests)
    texts, wrong = Counter(dict.fromkeys(range(clients), 0)), list[str]()
    held: dict[str, list[float]] = {node.home.name: [] for node in nodes}
    config = ClientConfig(dtype="float32", device="cpu", policy="spread")

    async def generate(number: int, client: Client) -> None:
        await client.member.reach_somebody(PATIENCE_S)
        at = number
        while True:
            request, ids = requests[at % len(requests)], list[int]()
            try:
                async with client.generate(request.prompt, request.config) as generation:
                    ids = [token.id async for token in generation]
            except P2PInferError as exc:
                wrong.append(f"client {number}: {exc}")
                await trio.sleep(1.0)
            else:
                if ids != expected[at % len(requests)]:
                    wrong.append(f"client {number} got {ids}")
                texts[number] += 1
            at += 1

    async with AsyncExitStack() as stack:
        joined = [
            await stack.enter_async_context(
                Client(
                    bootstrap=[node.address for node in nodes],
                    config=config,
                    cache_dir=home,
                    data_dir=home / f"client-{number}",
                )
            )
            for number in range(clients)
        ]
        nursery = await stack.enter_async_context(trio.open_nursery())  # ends before the clients do
        for number, client in enumerate(joined):
            nursery.start_soon(generate, number, client)
        print(f"{clients} clients, {len(nodes)} nodes, {seconds:g} s", flush=True)
        began, said_at = time.monotonic(), time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            for node in nodes:
                held[node.home.name].append(resident_mib(node.pid))
            if now >= said_at:
                said_at += SAY_S
                mib = ", ".join(f"{samples[-1]:.0f}" for samples in held.values())
                print(f"{now - began:8.0f} s  {texts.total()} texts; nodes hold {mib} MiB", flush=True)
            await trio.sleep(LOOK_S)
        nursery.cancel_scope.cancel()
    for name, samples in held.items():
        print(f"{name}: {samples[0]:.0f} MiB at first, {samples[-1]:.0f} at last", flush=True)
    print(f"{texts.total()} texts; a client got {min(texts.values())} to {max(texts.values())}", flush=True)
    return shortcomings(held, texts, wrong)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.endurance")
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    asked = parser.parse_args()
    zygote = Zygote()
    try:
        with tempfile.TemporaryDirectory(prefix="p2pinfer-endurance-") as home:
            nodes = [NodeProcess(zygote, Path(home) / f"node-{i}", span) for i, span in enumerate(SPANS)]
            for node in nodes:
                node.run([nodes[0].address], "--set", f"serve.prefix_keep_s={PREFIX_KEEP_S}")
            for node in nodes:
                node.wait_ready()
            failures = trio.run(_run, nodes, Path(home), asked.clients, asked.seconds)
            for node in nodes:
                node.signal(signal.SIGTERM)
            for node in nodes:
                if node.wait_ended(PATIENCE_S) or "Traceback" in node.said():
                    failures.append(f"{node.home.name} ended with {node.exit_code}: {node.said()[-2000:]}")
    finally:
        zygote.close()
    for failure in failures[:20]:
        print(f"FAILED {failure}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
