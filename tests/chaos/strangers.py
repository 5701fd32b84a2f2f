"""`python -m tests.chaos.strangers`: a node that a crowd attacks in every way, and honest clients beside it.

    undisturbed -> crowd: one client's rate -> crowd: newcomers -> undisturbed again

`crowd` says what the crowd does. There is a second node, which serves no blocks and introduces others. The
attacked one begins with that and with a bootstrap node of the crowd's. Prints a table of what was measured
and what is allowed, with `--json` as JSON as well. Exit code 1 if something is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import psutil
import trio

from p2pinfer.client import Client, ClientConfig
from p2pinfer.node.transport.identity import load_identity

from ..ports import free_port
from .crowd.victims import Victims, open_victims
from .processes import ROOT, ClientProcess, NodeProcess, Zygote
from .requests import expected_ids, make_requests
from .vitals import resident_mib

MORE_MIB = 200.0
LEAST_SHARE = 0.5
KNOCKS_PER_S = 1.0  # of all who are attacked together, at one address or one address range
WINDOW_S = 60.0  # over which they are counted
UNDISTURBED_S = 20.0  # before, and again after
ARRIVAL_S = 10.0  # of the crowd
NEWCOMERS = 2  # of each sort
NEWCOMER_S = 30.0  # until it has its text
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Row:
    """One figure. `allowed` says which are good."""

    what: str
    measured: float
    allowed: str
    kept: bool


@dataclass
class Findings:
    """All that was seen."""

    undisturbed: list[float] = field(default_factory=list[float])  # tokens per second, each text
    attacked: list[float] = field(default_factory=list[float])
    before_mib: float = 0.0
    most_mib: float = 0.0
    core: float = 0.0
    newcomers_s: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    wrong: list[str] = field(default_factory=list[str])

    def rows(self, victims: Victims) -> list[Row]:
        """The table."""
        quiet, loud = median(self.undisturbed), median(self.attacked)
        grown = self.most_mib - self.before_mib
        at_one, at_range = victims.busiest(WINDOW_S), victims.busiest_range(WINDOW_S)
        rows = [
            Row("honest client, undisturbed, tokens/s", quiet, "", True),
            Row(
                "honest client, attacked, tokens/s",
                loud,
                f">= {LEAST_SHARE:g} of that",
                loud >= LEAST_SHARE * quiet,
            ),
            Row("slowest text, tokens/s", min(self.attacked), "", True),
            Row("wrong or failed texts", len(self.wrong), "0", not self.wrong),
            Row("node's memory, more than before, MiB", grown, f"<= {MORE_MIB:g}", grown <= MORE_MIB),
            Row("node's processor time, of a core", self.core, "", True),
            Row(
                "connections at one victim, a second", at_one, f"<= {KNOCKS_PER_S:g}", at_one <= KNOCKS_PER_S
            ),
            Row(
                "connections at one /24, a second", at_range, f"<= {KNOCKS_PER_S:g}", at_range <= KNOCKS_PER_S
            ),
            Row("connections at all victims, in all", len(victims.knocks), "", True),
        ]
        for sort, took in self.newcomers_s.items():
            slowest = max(took, default=0.0)
            rows.append(
                Row(
                    f"newcomers, {sort}: slowest text, s",
                    slowest,
                    f"<= {NEWCOMER_S:g}",
                    slowest <= NEWCOMER_S,
                )
            )
        return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.strangers")
    parser.add_argument("--seconds", type=float, default=120.0, help="under attack, without the newcomers")
    parser.add_argument("--identities", type=int, default=50)
    parser.add_argument("--home", type=Path, help="keep logs and all else here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    zygote = Zygote()
    try:
        with tempfile.TemporaryDirectory(prefix="p2pinfer-strangers-") as home, open_victims() as victims:
            run = _Run(zygote, asked.home or Path(home), victims)
            trio.run(run.run, asked.seconds, asked.identities)
            run.end()
            rows = run.findings.rows(victims)
    finally:
        zygote.close()
    _print(rows)
    for wrong in run.findings.wrong:
        print(f"FAILED {wrong}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    kept = all(row.kept for row in rows)
    print("kept" if kept else "NOT KEPT", flush=True)
    return 0 if kept else 1


def _print(rows: list[Row]) -> None:
    print("| | measured | allowed | |\n| --- | ---: | --- | --- |", flush=True)
    for row in rows:
        said = ("kept" if row.kept else "NOT KEPT") if row.allowed else ""
        print(f"| {row.what} | {row.measured:.4g} | {row.allowed} | {said} |", flush=True)


class _Run:
    def __init__(self, zygote: Zygote, home: Path, victims: Victims) -> None:
        self.findings = Findings()
        self._zygote = zygote
        self._home = home
        self._victims = victims
        evil = home / "evil"
        self._evil_listens = f"/ip4/127.0.77.1/tcp/{free_port()}"
        self._evil = (evil, f"{self._evil_listens}/p2p/{load_identity(evil).peer_id}")
        self._introducer = NodeProcess(zygote, home / "introducer", None)
        self._introducer.run([])
        self._node = NodeProcess(zygote, home / "node", (0, 8))
        self._node.run([self._introducer.address, self._evil[1]])
        for node in (self._introducer, self._node):
            node.wait_ready()
        self._last = ClientProcess(zygote, home / "newcomer")

    async def run(self, seconds: float, identities: int) -> None:
        found, node = self.findings, self._node
        config = ClientConfig(dtype="float32", device="cpu")
        bootstrap = [node.address, self._introducer.address]
        async with Client(
            bootstrap=bootstrap, config=config, cache_dir=self._home, data_dir=self._home / "me"
        ) as client:
            await client.member.reach_somebody(PATIENCE_S)
            found.undisturbed += await self._rates(client, UNDISTURBED_S)
            found.before_mib = resident_mib(node.pid)
            print(f"undisturbed: {median(found.undisturbed):.1f} tokens/s", flush=True)
            async with self._crowd(client, identities), trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_memory)
                await trio.sleep(ARRIVAL_S)
                used, began = self._used_s(), time.monotonic()
                found.attacked += await self._rates(client, seconds)
                found.core = (self._used_s() - used) / (time.monotonic() - began)
                print(f"attacked: {median(found.attacked):.1f} tokens/s", flush=True)
                for _ in range(NEWCOMERS):
                    await self._newcomer("by the introducer", [self._introducer.address])
                    await self._newcomer("by the node", [node.address])
                    await self._newcomer("by introducer and crowd", [self._evil[1], self._introducer.address])
                    await self._newcomer("by the crowd, back again", [self._evil[1]])
                nursery.cancel_scope.cancel()
            await trio.sleep(ARRIVAL_S)
            found.undisturbed += await self._rates(client, UNDISTURBED_S)

    def end(self) -> None:
        """End the nodes, which must not have been harmed."""
        for node in (self._node, self._introducer):
            node.signal(signal.SIGTERM)
            if node.wait_ended(PATIENCE_S) or "Traceback" in node.said():
                self.findings.wrong.append(
                    f"{node.home.name} ended with {node.exit_code}: {node.said()[-2000:]}"
                )

    @asynccontextmanager
    async def _crowd(self, client: Client, identities: int) -> AsyncGenerator[None]:
        node, spec = self._node, client.spec
        command = [
            sys.executable,
            "-m",
            "tests.chaos.crowd",
            "--peer",
            node.peer_id,
            "--address",
            node.address,
        ]
        command += ["--revision", spec.revision, "--blocks", str(spec.num_blocks)]
        command += ["--identities", str(identities), "--victims", *self._victims.addrs]
        command += ["--bootstrap", str(self._evil[0]), self._evil_listens]
        crowd = await trio.lowlevel.open_process(command, cwd=ROOT)
        try:
            yield
            if crowd.poll() is not None:
                self.findings.wrong.append("the crowd went away by itself")
        finally:
            crowd.kill()

    async def _watch_memory(self) -> None:
        while True:
            self.findings.most_mib = max(self.findings.most_mib, resident_mib(self._node.pid))
            await trio.sleep(0.2)

    def _used_s(self) -> float:
        return float(sum(psutil.Process(self._node.pid).cpu_times()[:2]))

    async def _rates(self, client: Client, seconds: float) -> list[float]:
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
                self.findings.wrong.append(f"the honest client got {ids}")
        return rates

    async def _newcomer(self, sort: str, bootstrap: list[str]) -> None:
        """Somebody who comes for one text, in an empty folder or in that of whoever came last."""
        if "again" not in sort:
            self._last = ClientProcess(self._zygote, self._home / f"newcomer-{os.urandom(4).hex()}")
        client = self._last
        began = time.monotonic()
        client.run(bootstrap, len(self.findings.newcomers_s), PATIENCE_S)
        event = {"event": "failed", "error": f"no text within {PATIENCE_S:g} s"}
        while time.monotonic() < began + PATIENCE_S:
            ended = [each for each in client.events() if each["event"] != "began"]
            if ended:
                event = ended[0]
                break
            await trio.sleep(0.1)
        took_s = time.monotonic() - began
        client.signal(signal.SIGUSR1 if event["event"] == "ended" else signal.SIGKILL)
        await trio.to_thread.run_sync(client.wait_ended, PATIENCE_S)
        print(f"newcomer {sort}: {event['event']} after {took_s:.1f} s", flush=True)
        if event["event"] == "failed":
            print(f"  {event['error']}\n  " + "\n  ".join(client.said().splitlines()[-20:]), flush=True)
            self.findings.wrong.append(f"newcomer {sort}: {event['error']}")
        self.findings.newcomers_s.setdefault(sort, []).append(took_s)


if __name__ == "__main__":
    sys.exit(main())
