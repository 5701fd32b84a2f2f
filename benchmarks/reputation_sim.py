"""Malicious peers in a simulated swarm, against clients that know nothing, what they saw, or what all saw.

    python benchmarks/reputation_sim.py                    every attack at 20 % and 40 %; takes half an hour
    python benchmarks/reputation_sim.py --attacks fifth --shares 0.4 --rounds 60 --seeds 1
    python benchmarks/reputation_sim.py --newcomers        how long an honest newcomer takes to its fair share

A row is the mean over seeds, and the same for the same seeds. reputation_world.py says what is simulated and
what is the production code. Tables go to standard error, JSON to standard output.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean

from reputation_world import AUDIT_COST, STAGES, Attack, Defence, Peer, Tally, World

NONE, OWN, ALL = "none", "own", "all"
DEFENCES = {
    NONE: Defence(weighs=False, audits=False, shares=False),
    OWN: Defence(shares=False),
    ALL: Defence(),
}
ATTACKS = {
    "always": Attack(),
    "fifth": Attack(wrong=0.2),
    "twentieth": Attack(wrong=0.05),
    "withhold": Attack(wrong=0.2, withholds=True),
    "collude": Attack(wrong=0.2, colludes=True, withholds=True, remote=0.5),
    "collude-slander": Attack(wrong=0.2, colludes=True, withholds=True, lies=True, remote=0.5),
    "exit-scam": Attack(honest_first=100),
    "whitewash": Attack(wrong=0.2, rejoins="same range"),
    "whitewash-roaming": Attack(wrong=0.2, rejoins="new range"),
    "bad-mouth": Attack(wrong=0.2, lies=True),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run.

    Attributes:
        first, last, overall: Share of corrupted sessions, in the first and the last tenth, and all.
        thin_last: The last tenth's, of clients that cannot hold a span.
        spoilt: Sessions that a malicious identity spoilt before half of the clients had banned it.
        banned: Share of the malicious identities that worked at all and were banned so.
        honest_bans: Share of the pairs of a client and an honest peer in which it is banned.
        slowdown: Time of a token, over that in the same swarm without the malicious and without distrust.
        audit_cost: Extra compute over serving: audits, and proofs of others.
    """

    attack: str
    share: float
    defence: str
    seed: int
    first: float
    last: float
    overall: float
    thin_last: float
    spoilt: float
    banned: float
    honest_bans: float
    slowdown: float
    audit_cost: float
    late_audit_cost: float


def simulate(attack: str, share: float, defence: str, seed: int, rounds: int, **world: int) -> Outcome:
    """One swarm from the start, when nobody knows anybody."""
    logging.disable()
    swarm = World(ATTACKS[attack], DEFENCES[defence], random.Random(seed), malicious_share=share, **world)
    tallies = [swarm.step() for _ in range(rounds)]
    best = World(Attack(), DEFENCES[NONE], random.Random(seed), malicious_share=share, absent=True, **world)
    best_tallies = [best.step() for _ in range(max(rounds // 10, 1))]
    tenth = max(rounds // 10, 1)
    active = [peer for peer in (*swarm.former, *swarm.peers.values()) if peer.malicious and peer.served]
    gone = [peer for peer in active if peer.gone_at is not None]
    return Outcome(
        attack,
        share,
        defence,
        seed,
        first=_corrupted(tallies[:tenth]),
        last=_corrupted(tallies[-tenth:]),
        overall=_corrupted(tallies),
        thin_last=_thin_corrupted(tallies[-tenth:]),
        spoilt=mean(peer.wrong for peer in active) if active else 0.0,
        banned=len(gone) / len(active) if active else 0.0,
        honest_bans=_honest_bans(swarm),
        slowdown=_seconds(tallies) / _seconds(best_tallies),
        audit_cost=_audit_cost(tallies),
        late_audit_cost=_audit_cost(tallies[-tenth:]),
    )


def newcomers(seed: int, settled: int, rounds: int, window: int, **world: int) -> list[float]:
    """Traffic of eight honest newcomers, over what it is had they been there from the start; by window."""
    logging.disable()
    known, fresh = (
        World(Attack(), DEFENCES[ALL], random.Random(seed), malicious_share=0.0, **world) for _ in range(2)
    )
    there = _add_eight(known, random.Random(seed + 1))
    for swarm in (known, fresh):
        for _ in range(settled):
            swarm.step()
    came = _add_eight(fresh, random.Random(seed + 1))
    before = sum(peer.served for peer in there)
    shares: list[float] = []
    fresh_before = 0
    for _ in range(rounds // window):
        for swarm in (known, fresh):
            for _ in range(window):
                swarm.step()
        old, new = sum(peer.served for peer in there), sum(peer.served for peer in came)
        shares.append((new - fresh_before) / max(old - before, 1))
        before, fresh_before = old, new
    return shares


def _add_eight(swarm: World, rng: random.Random) -> list[Peer]:
    state, swarm.rng = swarm.rng, rng
    peers = [
        swarm.add_peer(STAGES[number % len(STAGES)], malicious=False, address=f"/ip4/21.0.{number}.1/tcp/1")
        for number in range(8)
    ]
    swarm.rng = state
    return peers


def _corrupted(tallies: Sequence[Tally]) -> float:
    return sum(each.corrupted for each in tallies) / sum(each.sessions for each in tallies)


def _thin_corrupted(tallies: Sequence[Tally]) -> float:
    return sum(each.thin_corrupted for each in tallies) / max(sum(each.thin_sessions for each in tallies), 1)


def _seconds(tallies: Sequence[Tally]) -> float:
    return sum(each.seconds for each in tallies) / sum(each.sessions for each in tallies)


def _audit_cost(tallies: Sequence[Tally]) -> float:
    return (
        AUDIT_COST * sum(each.audits + each.proofs for each in tallies) / sum(each.hops for each in tallies)
    )


def _honest_bans(swarm: World) -> float:
    honest = [peer.peer_id for peer in swarm.peers.values() if not peer.malicious]
    return mean(swarm.banned_by(peer_id) / len(swarm.clients) for peer_id in honest)


def averaged(outcomes: Iterable[Outcome]) -> list[dict[str, object]]:
    """One row for every attack, share and defence: means over the seeds."""
    rows: dict[tuple[str, float, str], list[Outcome]] = {}
    for each in outcomes:
        rows.setdefault((each.attack, each.share, each.defence), []).append(each)
    figures = list(Outcome.__slots__)[4:]
    return [
        {
            "attack": attack,
            "share": share,
            "defence": defence,
            "seeds": len(group),
            **{name: round(mean(getattr(each, name) for each in group), 5) for name in figures},
        }
        for (attack, share, defence), group in rows.items()
    ]


def table(rows: Iterable[dict[str, object]]) -> str:
    """The rows in Markdown."""
    heads = "attack | malicious | defence | corrupted: first tenth | last tenth | all | last tenth, thin"
    heads += " | spoilt each | banned | honest bans | slowdown | extra compute | in the last tenth"
    lines = [f"| {heads} |", "|" + "---|" * (heads.count("|") + 1)]
    for row in rows:
        percent = {
            name: f"{100 * float(str(row[name])):.2g} %"
            for name in (
                "first",
                "last",
                "overall",
                "thin_last",
                "banned",
                "honest_bans",
                "audit_cost",
                "late_audit_cost",
            )
        }
        cells = (
            *(row["attack"], f"{100 * float(str(row['share'])):.0f} %", row["defence"]),
            *(
                percent["first"],
                percent["last"],
                percent["overall"],
                percent["thin_last"],
                f"{row['spoilt']:.1f}",
            ),
            *(percent["banned"], percent["honest_bans"], f"{row['slowdown']:.2f}"),
            *(percent["audit_cost"], percent["late_audit_cost"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="NAME")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.4], metavar="SHARE")
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=150, help="sessions of each client")
    parser.add_argument("--peers", type=int, default=100)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--newcomers", action="store_true", help="measure a newcomer's share instead")
    asked = parser.parse_args()
    size = {"peers_count": asked.peers, "clients_count": asked.clients}
    if asked.newcomers:
        shares = [newcomers(seed, 60, 100, 5, **size) for seed in range(asked.seeds)]
        by_window = [round(mean(each), 3) for each in zip(*shares, strict=True)]
        print(json.dumps({"sessions_of_a_client": 5, "share_of_fair": by_window}, indent=1))
        return
    runs = [
        (attack, share, defence, seed, asked.rounds)
        for attack, share, defence, seed in product(
            asked.attacks, asked.shares, asked.defences, range(asked.seeds)
        )
    ]
    with ProcessPoolExecutor(asked.jobs) as pool:
        waiting = [pool.submit(simulate, *run, **size) for run in runs]
        outcomes = []
        for each in waiting:
            outcomes.append(each.result())
            print(outcomes[-1], file=sys.stderr)
    rows = averaged(outcomes)
    print(table(rows), file=sys.stderr)
    print(json.dumps({"runs": [asdict(each) for each in outcomes], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
