"""Many nodes join one introducer on this machine: how long until all see all, and what idling costs.

    python benchmarks/crowd.py --nodes 100
    python benchmarks/crowd.py --nodes 300 --processes 4

Hosts, gossip, snapshots and neighbourhoods are real and on loopback; there are no models. The nodes are
spread over a process for each core, the introducer has one of its own, and every node says who it is as soon
as it has joined, as `p2pinfer node` does. The clock starts when all processes have loaded their code and are
told to go. What idling costs is counted from ten seconds after all have seen all, and what these ten cost
for itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.swarm.membership import SwarmMember, open_swarm
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import Announcement

REVISION = "c" * 32
HOST = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), upnp=False, mdns=False, max_connections_per_address=4096)
LIMIT_S = 300.0
SETTLING_S = 10.0  # in which neighbours are chosen, addresses tried, and tables compared, once


async def crowd(nodes: int, processes: int, idle_s: float, places: int) -> dict[str, float]:
    """Seconds until every node's table has every node, and the share of a core that one takes after that."""
    shares = [nodes // processes + (part < nodes % processes) for part in range(processes)]
    async with _open_member((), places) as introducer, trio.open_nursery() as nursery:
        nursery.start_soon(introducer.follow_neighbours)
        parts = [await _start_part(nursery, share, nodes, idle_s) for share in shares]
        with trio.fail_after(LIMIT_S):
            await _hear_all(parts, "ready")
            began = time.monotonic()
            await _tell_all(parts, json.dumps(introducer.addrs))
            await _hear_all(parts, "joined")
            joined_s = time.monotonic() - began
            await _hear_all(parts, "all seen")
            seen_s = time.monotonic() - began
            settling, idle = [await _core_share(parts, period_s, nodes) for period_s in (SETTLING_S, idle_s)]
        nursery.cancel_scope.cancel()
    return {
        "nodes": nodes,
        "processes": processes,
        "joined_s": round(joined_s, 1),
        "all_see_all_s": round(seen_s, 1),
        "settling_core_share": settling,
        "idle_core_share": idle,
    }


async def _core_share(parts: Sequence[trio.Process], period_s: float, nodes: int) -> float:
    """What a node takes of a core in the next seconds, the introducer's share included."""
    spent = _cpu_s()
    await _tell_all(parts, "go on")
    spent_s = sum(float(answer) for answer in await _hear_all(parts)) + _cpu_s() - spent
    return round(spent_s / period_s / (nodes + 1), 5)


async def part(share: int, nodes: int, idle_s: float) -> None:
    """Be so many of the nodes, as the process that counts the time says on our standard input."""
    said = trio.wrap_file(sys.stdin)
    print("ready", flush=True)
    bootstrap = tuple(json.loads(await said.readline()))
    members: list[SwarmMember] = []
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as joining:
            for _ in range(share):
                joining.start_soon(_join, nursery, bootstrap, members)
        print("joined", flush=True)
        for member in members:
            while len(member.announcements(REVISION)) < nodes:
                await member.table_changed.wait()
        print("all seen", flush=True)
        for period_s in (SETTLING_S, idle_s):
            await said.readline()
            spent = _cpu_s()
            await trio.sleep(period_s)
            print(_cpu_s() - spent, flush=True)
        nursery.cancel_scope.cancel()


async def _join(nursery: trio.Nursery, bootstrap: tuple[str, ...], members: list[SwarmMember]) -> None:
    member = await nursery.start(_run, bootstrap)
    await member.join(REVISION)
    await member.wait_settled(30.0)
    await member.announce(_announcement(member))
    members.append(member)


async def _run(
    bootstrap: tuple[str, ...], *, task_status: trio.TaskStatus[SwarmMember] = trio.TASK_STATUS_IGNORED
) -> None:
    async with _open_member(bootstrap) as member:
        task_status.started(member)
        await trio.sleep_forever()


@asynccontextmanager
async def _open_member(bootstrap: tuple[str, ...], places: int = 512) -> AsyncGenerator[SwarmMember]:
    config = replace(HOST, max_connections=places)
    with tempfile.TemporaryDirectory() as home:
        async with open_swarm(new_identity(), config, bootstrap, Path(home)) as member:
            yield member


async def _start_part(nursery: trio.Nursery, share: int, nodes: int, idle_s: float) -> trio.Process:
    command = [sys.executable, __file__, "--nodes", str(nodes), "--share", str(share), "--idle", str(idle_s)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process: trio.Process = await nursery.start(lambda **kw: trio.run_process(command, **pipes, **kw))
    return process


async def _tell_all(parts: Sequence[trio.Process], line: str) -> None:
    for each in parts:
        assert each.stdin is not None
        await each.stdin.send_all(line.encode() + b"\n")


async def _hear_all(parts: Sequence[trio.Process], expected: str | None = None) -> list[str]:
    """The next line of each; nothing else is said before we answer."""
    lines: list[str] = []
    for each in parts:
        line = b""
        while not line.endswith(b"\n"):
            assert each.stdout is not None
            line += await each.stdout.receive_some(1)
        lines.append(line.decode().strip())
        assert expected in (None, lines[-1]), lines
    return lines


def _announcement(member: SwarmMember) -> Announcement:
    return Announcement(
        peer_id=member.peer_id,
        model="crowd",
        revision=REVISION,
        span=BlockSpan(0, 4),
        dtype="float32",
        tokens_per_s=10.0,
        free_cache_tokens=1000,
        sequence=int(time.time() * 1000),
        addrs=member.addrs,
        ttl_s=300.0,
    )


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="that the nodes are spread over"
    )
    parser.add_argument(
        "--places", type=int, default=512, help="connections that the introducer has room for"
    )
    parser.add_argument("--idle", type=float, default=20.0, help="seconds to watch the crowd idle")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # of the nodes, for one of the processes
    asked = parser.parse_args()
    # A node has a heap of its own, where collecting is cheap; here it looks through those of many.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    if asked.share is None:
        print(json.dumps(trio.run(crowd, asked.nodes, asked.processes, asked.idle, asked.places)))
    else:
        trio.run(part, asked.share, asked.nodes, asked.idle)
