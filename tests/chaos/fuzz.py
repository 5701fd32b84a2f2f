"""`python -m tests.chaos.fuzz`: a live node under a stream of wrong frames, and an honest client beside it.

Exit code 1 if the honest text ever differs, if its median step takes more than twice what it takes
undisturbed, if the node complains, or if it does not give everything back.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import trio

from p2pinfer.client import Client, ClientConfig

from .processes import ROOT, NodeProcess, Zygote
from .requests import expected_ids, make_requests
from .vitals import Vitals, describe, read_vitals

STEP_GAP_S = 0.02  # between the honest client's steps, lest it be the one that is in the way
WARM_UP_FRAMES = 500  # so that what is imported and cached on first use does not count as growth
MORE_MIB = 48.0
MORE_TASKS = 4
QUIET_S = 40.0  # until what was half open has timed out
PATIENCE_S = 120.0


@dataclass
class Outcome:
    """What came of it."""

    frames: dict[str, int]
    turned_away: int
    seconds: float
    undisturbed_ms: list[float]
    disturbed_ms: list[float]
    texts: int
    before: Vitals
    after: Vitals
    failures: list[str] = field(default_factory=list[str])

    def report(self) -> str:
        """For people, a figure a line."""
        rows = [f"  {protocol}: {count}" for protocol, count in sorted(self.frames.items())]
        quiet, loud = sorted(self.undisturbed_ms), sorted(self.disturbed_ms)
        return "\n".join(
            [
                f"{sum(self.frames.values())} mutated frames in {self.seconds:.0f} s, "
                f"{self.turned_away} streams turned away:",
                *rows,
                f"honest client: {self.texts} texts; a step takes {median(quiet):.2f} ms undisturbed, "
                f"{median(loud):.2f} ms under attack ({median(loud) / median(quiet):.2f} times); "
                f"95 % {quiet[int(0.95 * len(quiet))]:.2f} and {loud[int(0.95 * len(loud))]:.2f} ms",
                f"node before: {describe(self.before)}",
                f"node after:  {describe(self.after)}",
                *(f"FAILED {failure}" for failure in self.failures),
            ]
        )


def run_fuzz(
    frames: int,
    rate: float,
    seed: int,
    home: Path,
    say: Callable[[str], None] = print,
    *,
    most_slowed: float = 2.0,
    warm_up: int = WARM_UP_FRAMES,
    flags: Sequence[str] = (),
) -> Outcome:
    """Attack a node in a process of its own with so many frames, so many a second.

    Args:
        most_slowed: How many times as long as undisturbed the honest client's median step may take.
        warm_up: Frames that come before, and are not counted.
        flags: Of the node.
    """
    zygote = Zygote()
    try:
        node = NodeProcess(zygote, home / "node", (0, 8))
        node.run([], *flags)
        node.wait_ready()
        outcome = trio.run(_under_attack, node, frames, warm_up, rate, seed, home, say)
        node.signal(signal.SIGTERM)
        _judge(outcome, node.wait_ended(PATIENCE_S), node.said(), most_slowed)
        return outcome
    finally:
        zygote.close()


async def _under_attack(
    node: NodeProcess,
    frames: int,
    warm_up: int,
    rate: float,
    seed: int,
    home: Path,
    say: Callable[[str], None],
) -> Outcome:
    config = ClientConfig(dtype="float32", device="cpu")
    async with Client(bootstrap=[node.address], config=config, cache_dir=home, data_dir=home) as client:
        await client.member.reach_somebody(PATIENCE_S)
        honest = _Honest(client)
        await _attack(node, client, warm_up, rate, seed + 1, honest.generate)
        undisturbed = [step for _ in range(6) for step in await honest.generate()]
        say(f"undisturbed: a step takes {median(undisturbed):.2f} ms")
        before = await _settled(node)
        began, disturbed = time.monotonic(), list[float]()

        async def generate() -> None:
            disturbed.extend(await honest.generate())

        result = await _attack(node, client, frames, rate, seed, generate)
        seconds = time.monotonic() - began
        after = await _settled(node, before.tasks + MORE_TASKS)
    return Outcome(
        result["frames"],
        result["turned_away"],
        seconds,
        undisturbed,
        disturbed,
        honest.texts,
        before,
        after,
        honest.failures,
    )


class _Honest:
    """Generates the same drawn text again and again."""

    def __init__(self, client: Client) -> None:
        self.texts = 0
        self.failures: list[str] = []
        self._client = client
        self._request = next(each for each in make_requests() if each.config.temperature)
        (self._expected,) = expected_ids([self._request])

    async def generate(self) -> list[float]:
        """Milliseconds of every step after the first."""
        generation = self._client.generate(self._request.prompt, self._request.config)
        ids: list[int] = []
        steps_ms: list[float] = []
        began = time.perf_counter()
        async for token in generation:
            steps_ms.append((time.perf_counter() - began) * 1e3)
            ids.append(token.id)
            await trio.sleep(STEP_GAP_S)
            began = time.perf_counter()
        if ids != self._expected:
            self.failures.append(f"the honest client got {ids}")
        if generation.result.failovers:
            self.failures.append("the honest client lost its session")
        self.texts += 1
        return steps_ms[1:]


async def _attack(
    node: NodeProcess,
    client: Client,
    frames: int,
    rate: float,
    seed: int,
    meanwhile: Callable[[], Awaitable[object]],
) -> dict[str, Any]:
    """What the attacker has to say when it is done; calls `meanwhile` again and again until then."""
    command = [sys.executable, "-m", "tests.chaos.attacker", "--peer", node.peer_id]
    command += ["--address", node.address, "--revision", client.spec.revision]
    command += ["--hidden-size", str(client.spec.hidden_size), "--blocks", str(client.spec.num_blocks)]
    command += ["--frames", str(frames), "--rate", str(rate), "--seed", str(seed)]
    told: list[bytes] = []

    async def attack() -> None:
        done = await trio.run_process(command, cwd=ROOT, capture_stdout=True)
        told.append(done.stdout)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attack)
        while not told:
            await meanwhile()
            await trio.sleep(STEP_GAP_S)
    result: dict[str, Any] = json.loads(told[0])
    return result


async def _settled(node: NodeProcess, tasks: float = math.inf) -> Vitals:
    """What the node holds when nothing but the honest client's connection is left, or it takes too long.

    Args:
        tasks: Wait for no more than these, too: a handler may outlive its connection until it times out.
    """
    deadline = time.monotonic() + QUIET_S
    while True:
        vitals = await trio.to_thread.run_sync(read_vitals, node.pid, node.home / "vitals.json")
        is_quiet = vitals.sessions == 0 and vitals.connections == 1 and vitals.tasks <= tasks
        if is_quiet or time.monotonic() > deadline:
            return vitals
        await trio.sleep(1.0)


def _judge(outcome: Outcome, exit_code: int, said: str, most_slowed: float) -> None:
    ratio = median(outcome.disturbed_ms) / median(outcome.undisturbed_ms)
    before, after = outcome.before, outcome.after
    checks = [
        (ratio > most_slowed, f"a step takes {ratio:.2f} times as long under attack"),
        (exit_code != 0, f"the node ended with {exit_code}"),
        (said != "", f"the node said {said[-2000:]}"),
        (after.rss_mib > before.rss_mib + MORE_MIB, "the node holds more memory than before"),
        (after.threads > before.threads + 2, "the node has more threads than before"),
        (after.descriptors > before.descriptors + 1, "the node holds more descriptors than before"),
        (
            after.tasks > before.tasks + MORE_TASKS,
            f"the node has more tasks than before: {after.more_doing(before)}",
        ),
        (after.streams > before.streams + 2, "the node holds more streams than before"),
        (after.sessions > 0, "the node holds sessions of nobody"),
    ]
    outcome.failures += [failure for failed, failure in checks if failed]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.fuzz")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=200.0, help="frames a second")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    asked = parser.parse_args()
    print(f"fuzz seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="p2pinfer-fuzz-") as home:
        outcome = run_fuzz(asked.frames, asked.rate, asked.seed, Path(home))
    print(outcome.report(), flush=True)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
