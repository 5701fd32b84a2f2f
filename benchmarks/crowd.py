"""Many nodes join one introducer, all in this process: how long until all see all, and what idling costs.

    python benchmarks/crowd.py --nodes 100

Hosts, gossip, snapshots and neighbourhoods are real and on loopback; there are no models. Every node says who
it is as soon as it has joined, as `p2pinfer node` does.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import tempfile
import time
from pathlib import Path

import trio

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.host_config import HostConfig
from p2pinfer.node.identity import Identity, new_identity
from p2pinfer.node.swarm import SwarmMember, open_swarm
from p2pinfer.routing.announcement import Announcement

REVISION = "c" * 32
HOST = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), upnp=False, mdns=False, max_connections_per_address=4096)


async def crowd(nodes: int, idle_s: float, limit_s: float = 300.0) -> dict[str, float]:
    """Seconds until every node's table has every node, and the share of a core that one takes then."""
    members: list[SwarmMember] = []
    with tempfile.TemporaryDirectory() as home:
        async with trio.open_nursery() as nursery:
            introducer = await nursery.start(_run, new_identity(), (), Path(home))
            nursery.start_soon(introducer.follow_neighbours)
            began = time.monotonic()

            async def join() -> None:
                identity = new_identity()
                member = await nursery.start(_run, identity, introducer.addrs, Path(home))
                await member.join(REVISION)
                await member.wait_settled(30.0)
                await member.announce(_announcement(member))
                members.append(member)

            async with trio.open_nursery() as joining:
                for _ in range(nodes):
                    joining.start_soon(join)
            joined_s = time.monotonic() - began
            with trio.fail_after(limit_s):
                for member in members:
                    while len(member.announcements(REVISION)) < nodes:
                        await member.table_changed.wait()
            seen_s = time.monotonic() - began
            spent, since = _cpu_s(), time.monotonic()
            await trio.sleep(idle_s)
            share = (_cpu_s() - spent) / (time.monotonic() - since) / (nodes + 1) if idle_s else 0.0
            nursery.cancel_scope.cancel()
    return {"nodes": nodes, "joined_s": joined_s, "all_see_all_s": seen_s, "idle_core_share": share}


async def _run(
    identity: Identity,
    bootstrap: tuple[str, ...],
    home: Path,
    *,
    task_status: trio.TaskStatus[SwarmMember] = trio.TASK_STATUS_IGNORED,
) -> None:
    async with open_swarm(identity, HOST, bootstrap, home) as member:
        task_status.started(member)
        await trio.sleep_forever()


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds to watch the crowd idle")
    asked = parser.parse_args()
    # A node has a heap of its own, where collecting is cheap; here it looks through a hundred of them.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    print(json.dumps(trio.run(crowd, asked.nodes, asked.idle)))
