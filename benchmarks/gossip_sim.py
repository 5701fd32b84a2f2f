"""A topic in simulated seconds: how fast news spreads, how much is sent, and what lost messages do to tables.

    python benchmarks/gossip_sim.py --nodes 100 300 1000 --loss 0.0 0.2

Tables, announcements, intervals and pauses between comparisons are p2pinfer's own; the network is a seeded
random graph in which a message takes a second and is lost now and then. Sizes are those of real records.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from dataclasses import replace

from p2pinfer.models.span import BlockSpan
from p2pinfer.node.config import ServeConfig
from p2pinfer.node.serve.announcer import announce_interval_s, announce_ttl_s
from p2pinfer.node.swarm.anti_entropy import FIRST_S, next_pause_s
from p2pinfer.node.swarm.signed_records import seal
from p2pinfer.node.swarm.snapshot import TAG_BYTES
from p2pinfer.node.transport.identity import new_identity
from p2pinfer.routing.announcement import Announcement, encode_announcement
from p2pinfer.routing.table import SwarmTable

REVISION = "c" * 32
DEGREE = 4  # of the mesh, as in node/swarm/gossip.py
LOOK_S = 10  # between looks at all tables, once all have seen all
FRAME_BYTES = 220  # what gossip, yamux, Noise and TCP add to a record


def simulate(nodes: int, loss: float, minutes: float, seed: int) -> dict[str, float]:
    """What a topic of so many nodes, all of which join within a second, does in so many minutes."""
    rng, config = random.Random(seed), ServeConfig()
    names = [f"{index:05d}" for index in range(nodes)]
    tables = [SwarmTable() for _ in names]
    mesh = _mesh(nodes, rng)
    first = replace(_example(), ttl_s=announce_ttl_s(nodes, config))
    record_bytes = len(seal(new_identity(), encode_announcement(first)))
    arriving: defaultdict[int, list[tuple[int, bytes]]] = defaultdict(list)
    announce_at = [rng.random() for _ in names]
    compare_at, pauses = [FIRST_S + rng.random() for _ in names], [FIRST_S] * nodes
    made: dict[bytes, Announcement] = {}  # what stands for each sealed record
    received = bytes_sent = all_see_all_s = missing_later = 0
    for now in range(int(minutes * 60)):
        for index, name in enumerate(names):
            if announce_at[index] <= now:
                announce_at[index] += announce_interval_s(nodes, config)
                made[record := f"{name} {now}".encode()] = replace(first, peer_id=name, sequence=now + 1)
                arriving[now].append((index, record))
        for index, record in arriving.pop(now, []):
            received += 1
            if tables[index].accept(made[record], record, now):
                bytes_sent += len(mesh[index]) * (record_bytes + FRAME_BYTES)
                arriving[now + 1] += [(each, record) for each in mesh[index] if rng.random() >= loss]
        for index in range(nodes):
            if compare_at[index] <= now:
                other = tables[rng.choice(mesh[index])]
                entries = other.records(now, REVISION)
                news = sum(
                    tables[index].accept(made[record], record, now, age_s) for record, age_s in entries
                )
                bytes_sent += TAG_BYTES * len(tables[index]) + news * record_bytes + FRAME_BYTES
                pauses[index] = next_pause_s(pauses[index], news / max(1, len(tables[index])))
                compare_at[index] = now + pauses[index] * rng.uniform(0.75, 1.25)
        if now > 0 and (now % LOOK_S == 0 or not all_see_all_s):
            missing = sum(nodes - len(table.live(REVISION, now)) for table in tables)
            if all_see_all_s:
                missing_later = max(missing_later, missing)
            elif not missing:
                all_see_all_s = now
    each_second = nodes * minutes * 60
    return {
        "nodes": nodes,
        "loss": loss,
        "all_see_all_s": all_see_all_s,
        "share_missing_later_at_worst": round(missing_later / nodes**2, 5),
        "messages_per_s": round(received / each_second, 2),
        "kilobytes_per_s": round(bytes_sent / each_second / 1000, 2),
        "record_bytes": record_bytes,
    }


def _mesh(nodes: int, rng: random.Random) -> list[list[int]]:
    """A connected graph in which everybody has about `DEGREE` neighbours."""
    edges: list[set[int]] = [set() for _ in range(nodes)]
    order = list(range(nodes))
    for _ in range(DEGREE // 2):
        rng.shuffle(order)
        for one, other in zip(order, [*order[1:], order[0]], strict=True):
            edges[one].add(other)
            edges[other].add(one)
    return [sorted(each - {index}) for index, each in enumerate(edges)]


def _example() -> Announcement:
    addrs = tuple(f"/ip4/203.0.113.7/tcp/{4001 + n}/p2p/{'1' * 52}" for n in range(4))
    return Announcement(
        peer_id="1" * 52,
        model="meta-llama/Llama-3.1-8B",
        revision=REVISION,
        span=BlockSpan(0, 8),
        dtype="bfloat16",
        tokens_per_s=123.4,
        free_cache_tokens=100_000,
        sequence=1,
        addrs=addrs,
        ttl_s=120.0,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--loss", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    for nodes in asked.nodes:
        for loss in asked.loss:
            print(json.dumps(simulate(nodes, loss, asked.minutes, asked.seed)))
