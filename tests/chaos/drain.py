"""`python -m tests.chaos.drain`: a node that serves eight sessions is asked to leave, and nobody notices.

Exit code 1 if a text was wrong, an error was seen, a token came a second late, or the node took ten seconds.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from p2pinfer.client import Client, ClientConfig
from p2pinfer.client_config import AuditConfig, SessionConfig
from p2pinfer.errors import P2PInferError

from ..e2e.support import Along
from .processes import NodeProcess, Zygote
from .requests import Request, expected_ids, history

SESSIONS = 8
HISTORY = 64  # tokens
TOKENS = 120  # of each: at most so long that every session still runs when the node leaves
BEFORE = 8  # tokens that every session has when the node is asked to leave
MOST_STALLED_S = 1.0
MOST_EXIT_S = 10.0


@dataclass
class Outcome:
    """What came of it."""

    exit_s: float = 0.0
    exit_code: int = 0
    failovers: int = 0
    running: int = 0  # sessions when the node was asked to leave
    stalls_s: list[float] = field(default_factory=list[float])  # the longest of each session
    failures: list[str] = field(default_factory=list[str])

    def report(self) -> str:
        """For people."""
        return (
            f"{self.running} sessions, {self.failovers} failovers; the longest pause between two tokens "
            f"{max(self.stalls_s, default=0.0):.2f} s; the node was gone after {self.exit_s:.2f} s"
        )


def run_drain(
    home: Path, *, most_stalled_s: float = MOST_STALLED_S, most_exit_s: float = MOST_EXIT_S
) -> Outcome:
    """Two nodes and one that could take over; one of the two leaves.

    Args:
        most_stalled_s: Between two tokens of a session.
        most_exit_s: For the node to be gone.
    """
    zygote = Zygote()
    try:
        nodes = [
            NodeProcess(zygote, home / name, span)
            for name, span in (("leaves", (0, 4)), ("stays", (4, 8)), ("takes-over", (0, 4)))
        ]
        for node in nodes:
            node.run([nodes[1].address])
        for node in nodes:
            node.wait_ready()
        outcome = Outcome()
        trio.run(_generate, nodes, outcome, home)
        _judge(outcome, most_stalled_s, most_exit_s)
        return outcome
    finally:
        zygote.close()


async def _generate(nodes: Sequence[NodeProcess], outcome: Outcome, home: Path) -> None:
    request = history(None, HISTORY, TOKENS)
    expected = await trio.to_thread.run_sync(lambda: expected_ids([request])[0])
    leaving = nodes[0]
    begun, all_begun = 0, trio.Event()

    async def begin() -> None:
        """Wait for the others: on a slow machine one could be over before the last one is open."""
        nonlocal begun
        begun += 1
        if begun == SESSIONS:
            all_begun.set()
        await all_begun.wait()

    async def leave() -> None:
        await all_begun.wait()
        outcome.running = SESSIONS - len(outcome.stalls_s)
        asked_at = time.monotonic()
        leaving.signal(signal.SIGTERM)
        outcome.exit_code = await trio.to_thread.run_sync(leaving.wait_ended, 60.0)
        outcome.exit_s = time.monotonic() - asked_at

    async with _client(nodes, home) as client, trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        for _ in range(SESSIONS):
            nursery.start_soon(_one, client, request, expected, outcome, begin)


def _client(nodes: Sequence[NodeProcess], home: Path) -> Client:
    return Client(
        bootstrap=[nodes[1].address],
        policy=Along([(nodes[0].peer_id, 0, 4), (nodes[1].peer_id, 4, 8)]),
        config=ClientConfig(dtype="float32", device="cpu", find_timeout_s=60.0),
        session_config=SessionConfig(slow_step_s=60.0),
        audit=AuditConfig(rate=0.0),
        cache_dir=home,
        data_dir=home,
    )


async def _one(
    client: Client,
    request: Request,
    expected: Sequence[int],
    outcome: Outcome,
    begin: Callable[[], Awaitable[None]],
) -> None:
    ids: list[int] = []
    longest_s, last_at = 0.0, 0.0
    generation = client.generate(request.prompt, request.config)
    try:
        async for token in generation:
            now = time.monotonic()
            longest_s = max(longest_s, now - last_at) if len(ids) >= BEFORE else 0.0
            last_at = now
            ids.append(token.id)
            if len(ids) == BEFORE:
                await begin()
                last_at = time.monotonic()
    except P2PInferError as exc:
        outcome.failures.append(f"a session saw {type(exc).__name__}: {exc}")
        if len(ids) < BEFORE:
            await begin()
    outcome.stalls_s.append(longest_s)
    outcome.failovers += generation.result.failovers
    if ids != list(expected):
        outcome.failures.append(f"a session gave {ids}")


def _judge(outcome: Outcome, most_stalled_s: float, most_exit_s: float) -> None:
    if max(outcome.stalls_s) > most_stalled_s:
        outcome.failures.append(f"a token came after {max(outcome.stalls_s):.2f} s")
    if outcome.exit_s > most_exit_s or outcome.exit_code:
        outcome.failures.append(f"the node left after {outcome.exit_s:.2f} s with {outcome.exit_code}")
    if outcome.running < SESSIONS:
        outcome.failures.append(f"only {outcome.running} sessions still ran")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="p2pinfer-drain-") as home:
        outcome = run_drain(Path(home))
    print(outcome.report(), flush=True)
    for failure in outcome.failures:
        print(f"FAILED {failure}", flush=True)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
