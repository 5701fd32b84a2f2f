"""`python -m tests.chaos.strangers`: a node that a crowd attacks, and an honest client beside it.

`crowd` says what the crowd does. Prints the honest client's tokens per second without and with it, and the
node's memory. Exit code 1 if a text is wrong, if the client has less than half of its undisturbed rate, or if
the node has come to hold `MORE_MIB` more than before.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil
import trio

from p2pinfer.client import Client, ClientConfig

from .processes import ROOT, NodeProcess, Zygote
from .requests import expected_ids, make_requests

MORE_MIB = 200.0
LEAST_SHARE = 0.5
UNDISTURBED_S = 20.0
ARRIVAL_S = 10.0  # of the crowd
PATIENCE_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.strangers")
    parser.add_argument("--seconds", type=float, default=120.0, help="under attack")
    asked = parser.parse_args()
    zygote = Zygote()
    try:
        with tempfile.TemporaryDirectory(prefix="p2pinfer-strangers-") as home:
            node = NodeProcess(zygote, Path(home) / "node", (0, 8))
            node.run([])
            node.wait_ready()
            failures = trio.run(_compare, node, Path(home), asked.seconds)
            node.signal(signal.SIGTERM)
            if node.wait_ended(PATIENCE_S):
                failures.append(f"the node ended with {node.exit_code} and said {node.said()[-2000:]}")
    finally:
        zygote.close()
    for failure in failures:
        print(f"FAILED {failure}", flush=True)
    return 1 if failures else 0


async def _compare(node: NodeProcess, home: Path, seconds: float) -> list[str]:
    failures: list[str] = []
    process = psutil.Process(node.pid)
    config = ClientConfig(dtype="float32", device="cpu")
    async with Client(bootstrap=[node.address], config=config, cache_dir=home, data_dir=home) as client:
        await client.member.reach_somebody(PATIENCE_S)
        quiet = await _rates(client, UNDISTURBED_S, failures)
        before_mib = process.memory_info().rss / 2**20
        print(
            f"undisturbed: {median(quiet):.1f} tokens/s, {len(quiet)} texts; {before_mib:.0f} MiB", flush=True
        )
        command = [sys.executable, "-m", "tests.chaos.crowd", "--peer", node.peer_id]
        command += ["--address", node.address, "--revision", client.spec.revision]
        command += ["--blocks", str(client.spec.num_blocks)]
        most_mib = 0.0

        async def watch_memory() -> None:
            nonlocal most_mib
            while True:
                most_mib = max(most_mib, process.memory_info().rss / 2**20)
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            crowd = await trio.lowlevel.open_process(command, cwd=ROOT)
            await trio.sleep(ARRIVAL_S)
            nursery.start_soon(watch_memory)
            used, began = sum(process.cpu_times()[:2]), time.monotonic()
            loud = await _rates(client, seconds, failures)
            core = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)
            if crowd.poll() is not None:
                failures.append("the crowd went away by itself")
            crowd.kill()
            nursery.cancel_scope.cancel()
        print(
            f"under attack: {median(loud):.1f} tokens/s ({median(loud) / median(quiet):.2f} of it), "
            f"{len(loud)} texts, the slowest {min(loud):.1f}; {most_mib:.0f} MiB at most, "
            f"{core:.0%} of a core",
            flush=True,
        )
        if median(loud) < LEAST_SHARE * median(quiet):
            failures.append("the honest client has less than half of its undisturbed rate")
        if most_mib > before_mib + MORE_MIB:
            failures.append(f"the node grew by {most_mib - before_mib:.0f} MiB")
    return failures


async def _rates(client: Client, seconds: float, failures: list[str]) -> list[float]:
    """Tokens per second of one text after the other."""
    requests = make_requests()
    answers = await trio.to_thread.run_sync(expected_ids, requests)
    request, expected = max(zip(requests, answers, strict=True), key=lambda each: len(each[1]))
    rates: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until or not rates:
        began = time.monotonic()
        ids = [token.id async for token in client.generate(request.prompt, request.config)]
        rates.append(len(ids) / (time.monotonic() - began))
        if ids != expected:
            failures.append(f"the honest client got {ids}")
    return rates


if __name__ == "__main__":
    sys.exit(main())
