"""`python -m tests.chaos.soak`: what many sessions leave behind on a node, which must be nothing.

    10,000 sessions opened and closed, 200 at once, and 50 of a client that stops to exist without a word

Prints what the node held before and after each. Exit code 1 if a text was wrong or something was left.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from p2pinfer.client import Client, ClientConfig
from p2pinfer.node.transport.yamux import LINGER_S, PING_INTERVAL_S

from .processes import ClientProcess, NodeProcess, Zygote
from .vitals import Vitals, describe, read_vitals

CLIENTS = 4
TURNS = 32  # sessions open at once while many come and go
WARM_UP = 300  # sessions, so that what is imported and cached on first use does not count as growth
LEASE_S = 15.0
MORE_MIB = 32.0
PATIENCE_S = 120.0
PROMPT = "Once upon a time"
ANSWER = ", there was a little girl named Lily. She loved to play with her toys"


@dataclass
class Outcome:
    """Figures, a line each, and what went wrong."""

    lines: list[str] = field(default_factory=list[str])
    failures: list[str] = field(default_factory=list[str])

    def report(self) -> str:
        return "\n".join([*self.lines, *(f"FAILED {failure}" for failure in self.failures)])


def run_soak(
    sessions: int,
    at_once: int,
    held: int,
    home: Path,
    say: Callable[[str], None] = lambda _: None,
    *,
    warm_up: int = WARM_UP,
) -> Outcome:
    """Put one node through all of it.

    Args:
        held: Sessions of the client that freezes; 0 for none.
        warm_up: Sessions that come before, and are not counted.
    """
    zygote = Zygote()
    try:
        node = NodeProcess(zygote, home / "node", (0, 8))
        # Clients here are faster than any that the limits are made for.
        limits = ("--set", "host.streams_per_s=100000", "--set", "host.streams_at_once=100000")
        # Caches of sessions that are over stay while there is room, which is no leak; here they go.
        node.run([], "--set", f"serve.lease_s={LEASE_S}", "--set", "serve.prefix_keep_s=0.001", *limits)
        node.wait_ready()
        holder = ClientProcess(zygote, home / "holder")
        soak = _Soak(node, home, say)
        trio.run(soak.run, sessions, at_once, warm_up)
        if held:
            trio.run(soak.hold, held, holder)
        node.signal(signal.SIGTERM)
        if node.wait_ended(PATIENCE_S) or node.said():
            soak.outcome.failures.append(f"the node ended with {node.exit_code} and said {node.said()}")
        return soak.outcome
    finally:
        zygote.close()


class _Soak:
    def __init__(self, node: NodeProcess, home: Path, say: Callable[[str], None]) -> None:
        self.outcome = Outcome()
        self._node = node
        self._home = home
        self._say = say

    async def run(self, sessions: int, at_once: int, warm_up: int) -> None:
        """The sessions that end as they should."""
        async with self._clients(1) as clients:
            await self._many(clients, warm_up, 1)
            await self._together(clients, at_once)
        before = await self._vitals("before", None)
        async with self._clients(CLIENTS) as clients:
            took_s = await self._many(clients, sessions, 1)
        what = f"{sessions} sessions, {TURNS} at a time, in {took_s:.0f} s ({sessions / took_s:.0f} a second)"
        before = await self._vitals(what, before)
        async with self._clients(CLIENTS) as clients:
            took_s = await self._together(clients, at_once)
        await self._vitals(f"{at_once} sessions at once, in {took_s:.1f} s", before)

    async def hold(self, held: int, holder: ClientProcess) -> None:
        """Those of a client that is there and does nothing any more, as a machine that sleeps."""
        before = await trio.to_thread.run_sync(self._read)
        holder.run([self._node.address], 0, PATIENCE_S, "--hold", str(held))
        while not any(event["event"] == "holding" for event in holder.events()):
            assert holder.exit_code is None, holder.said()
            await trio.sleep(0.2)
        holder.signal(signal.SIGSTOP)
        sessions = (await trio.to_thread.run_sync(self._read)).sessions
        if sessions != held:
            self.outcome.failures.append(f"the node holds {sessions} sessions of {held}")
        began = time.monotonic()
        what = f"{held} sessions of a client that froze"
        await self._vitals(what, before, LEASE_S + 2 * PING_INTERVAL_S + LINGER_S + 20)
        gone_s = time.monotonic() - began
        self._note(f"they and their streams were gone {gone_s:.0f} s later; a lease is {LEASE_S:.0f} s")
        holder.signal(signal.SIGKILL)

    async def _many(self, clients: Sequence[Client], sessions: int, tokens: int) -> float:
        """Sessions one after the other, some at a time; how long they took together."""
        left = sessions
        began = time.monotonic()

        async def work(client: Client) -> None:
            nonlocal left
            while left:
                left -= 1
                await self._generate(client, tokens)

        async with trio.open_nursery() as nursery:
            for index in range(TURNS):
                nursery.start_soon(work, clients[index % len(clients)])
        return time.monotonic() - began

    async def _together(self, clients: Sequence[Client], at_once: int) -> float:
        """So many that all have their first token before any goes on."""
        began = time.monotonic()
        waiting, everybody = at_once, trio.Event()

        async def arrive() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                everybody.set()
            await everybody.wait()

        async with trio.open_nursery() as nursery:
            for index in range(at_once):
                nursery.start_soon(self._generate, clients[index % len(clients)], 8, arrive)
        return time.monotonic() - began

    async def _generate(
        self, client: Client, tokens: int, in_between: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        generation = client.generate(PROMPT, max_new_tokens=tokens)
        async for _ in generation:
            if in_between is not None:
                arrived, in_between = in_between, None
                await arrived()
        result = generation.result
        if not ANSWER.startswith(result.text) or len(result.token_ids) != tokens:
            self.outcome.failures.append(f"a session gave {result.text!r}")

    @asynccontextmanager
    async def _clients(self, count: int) -> AsyncGenerator[list[Client]]:
        config = ClientConfig(dtype="float32", device="cpu")
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(
                    Client(
                        bootstrap=[self._node.address],
                        config=config,
                        cache_dir=self._home,
                        data_dir=self._home,
                    )
                )
                for _ in range(count)
            ]
            for client in clients:
                await client.member.reach_somebody(PATIENCE_S)
            yield clients

    async def _vitals(self, what: str, before: Vitals | None, patience_s: float = 30.0) -> Vitals:
        """Once nothing is left of it; fails what is held beyond `before` for longer than that."""
        deadline = time.monotonic() + patience_s
        while True:
            vitals = await trio.to_thread.run_sync(self._read)
            grown = _grown(before or vitals, vitals)
            settled = not grown and (before is not None or not vitals.connections)
            if settled or time.monotonic() > deadline:
                break
            await trio.sleep(1.0)
        self._note(f"{what}: {describe(vitals)}")
        self.outcome.failures += [f"after {what}: {each}" for each in grown]
        return vitals

    def _read(self) -> Vitals:
        return read_vitals(self._node.pid, self._node.home / "vitals.json")

    def _note(self, line: str) -> None:
        self._say(line)
        self.outcome.lines.append(line)


def _grown(before: Vitals, after: Vitals) -> list[str]:
    """What there is more of. A connection that is left has two streams of gossip and a dozen tasks."""
    connections = after.connections
    grown = {
        f"{after.sessions} sessions": after.sessions > 0,
        f"memory from {before.rss_mib} MiB": after.rss_mib > before.rss_mib + MORE_MIB,
        f"threads from {before.threads}": after.threads > before.threads + 1,
        f"descriptors from {before.descriptors}": after.descriptors > before.descriptors + connections,
        f"{after.streams} streams": after.streams > 2 * connections,
        f"tasks {after.more_doing(before)}": after.tasks > before.tasks + 12 * connections + 1,
    }
    return [each for each, is_so in grown.items() if is_so]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--held", type=int, default=50, help="by a client that freezes")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="p2pinfer-soak-") as home:
        outcome = run_soak(
            asked.sessions, asked.at_once, asked.held, Path(home), lambda line: print(line, flush=True)
        )
    for failure in outcome.failures:
        print(f"FAILED {failure}", flush=True)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
