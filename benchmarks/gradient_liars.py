"""Six node processes, of which one lies in training: in how many audits it is found, and what that costs.

    python benchmarks/gradient_liars.py                              # every cheat, one after the other
    python benchmarks/gradient_liars.py --cheat grad-scaled grad-stale:0.2
    python benchmarks/gradient_liars.py --cheat - --steps 60         # nobody lies

The nodes are `p2pinfer node` on loopback, two for each part of the bundled model, of which the first one of
the middle part lies, and the other one is slow; `gradient_cheats.py` has the cheats. One client trains LoRA
with the default settings, few steps at a time, until the liar is banned or all steps are made. Another
process trains nothing and learns of it by proof.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trio
from contest import report
from liars import HEROES, OPENINGS, new_verifier, open_bystander, open_nodes

from p2pinfer.client import Client
from p2pinfer.client_config import AuditConfig, ClientConfig, TuneConfig
from p2pinfer.events import AuditDone
from p2pinfer.learning.tuner import Tuner
from p2pinfer.node.host_config import HostConfig

CHEATS = ("grad-zeros", "grad-stale", "grad-scaled", "grad-sign", "int8", "grad-skip")
ROWS = 8
STEPS_OF_ONE = 6  # of one training; then another one begins, perhaps over other hops


async def contest(cheat: str, steps: int) -> dict[str, Any]:
    """One training beside one liar."""
    audits: list[AuditDone] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        verifier = new_verifier(home / "cache")
        client = Client(
            host_config=HostConfig(listen=("/ip4/127.0.0.1/tcp/0",)),
            config=ClientConfig(draft="off"),
            data_dir=home / "client",
            cache_dir=home / "cache",
            audit=AuditConfig(),
            verifier=verifier,
            on_event=lambda event: audits.append(event) if isinstance(event, AuditDone) else None,
        )
        async with client, open_nodes(home, client.member.addrs, ("-", cheat, "-", "-", "slow")) as nodes:
            with trio.fail_after(60):
                while len(client.peers()) < len(nodes):
                    await trio.sleep(0.1)
            liars = [node.peer_id for node in nodes if node.cheat not in ("", "slow")]
            async with open_bystander(home / "early", liars, client.member.addrs) as early:
                started, made, met = time.perf_counter(), 0, 0
                while made < steps and not (liars and all(map(client.ledger.is_banned, liars))):
                    async with client.tuner(TuneConfig(batch_rows=ROWS)) as tuner:
                        for _ in range(min(STEPS_OF_ONE, steps - made)):
                            await make_step(tuner, made)
                            made += 1
                            met += any(each in tuner.hops for each in liars)
                            if liars and all(map(client.ledger.is_banned, liars)):
                                break
                    await client.audits_settled()
                seconds = time.perf_counter() - started
                of_liars = [each for each in audits if each.peer_id in liars]
                banned = {node.peer_id for node in nodes if client.ledger.is_banned(node.peer_id)}
                other = await early.ask()
        return {
            "cheat": cheat,
            "steps": made,
            "with the liar": met,
            "audits of the liar": len(of_liars),
            "reason": next((each.reason for each in of_liars if each.verdict == "fail"), ""),
            "banned": f"{len(banned & {*liars})} of {len(liars)}",
            "by a bystander": f"{len({*other['banned']} & {*liars})} of {len(liars)}",
            "honest banned": len(banned - {*liars}) + len({*other["banned"]} - {*liars}),
            "audits": client.audits.done,
            "suspect": client.audits.suspect,
            "no result": client.audits.inconclusive,
            "audits s": round(verifier.spent_s, 2),
            "seconds": round(seconds, 1),
        }


async def make_step(tuner: Tuner, number: int) -> None:
    """One step of a training."""
    batch = [
        tuner.example("", opening.format(HEROES[(number + row) % len(HEROES)]))
        for row, opening in enumerate(OPENINGS[:ROWS])
    ]
    await tuner.forward_backward(batch)
    await tuner.optim_step()


async def contests(cheats: Sequence[str], steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for cheat in cheats:
        rows.append(await contest(cheat, steps))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cheat", nargs="+", default=CHEATS)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report("one of six nodes lies in training", trio.run(contests, options.cheat, options.steps))


if __name__ == "__main__":
    main()
