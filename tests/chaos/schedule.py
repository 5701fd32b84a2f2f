"""Which fault happens when, to whom, and for how long: a function of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

Harm: TypeAlias = Literal["kill", "freeze", "leave", "vanish"]
Line: TypeAlias = Literal["move", "sleep", "doze", "stutter"]
Attack: TypeAlias = Literal["lure", "inventions", "cannon", "snapshots", "hoards", "control"]
Kind: TypeAlias = Harm | Line | Attack
HARMS: Final[tuple[Kind, ...]] = get_args(Harm)
KINDS: Final[tuple[Kind, ...]] = (*HARMS, *get_args(Line), *get_args(Attack))
OF_CLIENTS: Final[frozenset[Kind]] = frozenset(("vanish", "doze", "stutter", "lure"))
OF_CROWDS: Final[frozenset[Kind]] = frozenset(("inventions", "cannon", "snapshots", "hoards", "control"))
ENDING: Final[frozenset[Kind]] = frozenset(("kill", "leave", "move"))  # of a node

GAP_S: Final = (2.0, 6.0)  # between two faults
LASTS_S: Final[dict[Kind, tuple[float, float]]] = {
    "kill": (1.0, 12.0),  # until the node is started again, as the same peer
    "freeze": (1.0, 15.0),  # between SIGSTOP and SIGCONT
    "leave": (1.0, 8.0),  # after a SIGTERM, until the node is started again
    "vanish": (1.0, 6.0),  # a client killed in the middle of whatever it does, until the next one comes
    "move": (1.0, 8.0),  # a node that is killed and comes back as the same peer at another address
    "sleep": (30.0, 60.0),  # a node's machine, its lid closed
    "doze": (15.0, 45.0),  # a client's
    "stutter": (5.0, 20.0),  # a client that reads its results a quarter of the time
    "lure": (10.0, 30.0),  # a client that begins with a bootstrap node which tells only of invented peers
    # a crowd of strangers at a node (`crowd.attacks`)
    "inventions": (15.0, 30.0),
    "cannon": (15.0, 30.0),
    "snapshots": (15.0, 30.0),
    "hoards": (15.0, 30.0),
    "control": (15.0, 30.0),
}
RECOVERY_S: Final = 12.0  # for which who was harmed is left in peace: a start, an announcement
MOST_AT_ONCE: Final = 3  # nodes harmed or recovering; the others cannot always hold every block


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. `target` is a node's number, or a client's for kinds that are of clients."""

    at_s: float
    kind: Kind
    target: int
    lasts_s: float


def plan_faults(
    seed: int,
    duration_s: float,
    *,
    nodes: int,
    clients: int,
    survivors: Sequence[int],
    kinds: Sequence[Kind] = KINDS,
) -> list[Fault]:
    """The faults of a run, in order.

    Args:
        survivors: Nodes that are frozen now and then but never ended, so that growth in them shows.
    """
    rng = random.Random(seed)
    faults: list[Fault] = []
    busy_until: dict[tuple[str, int], float] = {}
    at_s = 0.0
    while (at_s := round(at_s + rng.uniform(*GAP_S), 3)) < duration_s:
        kind = rng.choice(kinds)
        whose = whose_fault(kind)
        free = [
            target
            for target in range(clients if whose == "client" else nodes)
            if busy_until.get((whose, target), 0.0) <= at_s
            and (kind not in ENDING or target not in survivors)
        ]
        busy = sum(until > at_s for (of, _), until in busy_until.items() if of == whose)
        lasts_s = rng.uniform(*LASTS_S[kind])
        if not free or busy >= {"client": clients, "crowd": 1, "node": MOST_AT_ONCE}[whose]:
            continue
        target = rng.choice(free)
        busy_until[whose, target] = at_s + lasts_s + RECOVERY_S
        faults.append(Fault(at_s, kind, target, round(lasts_s, 3)))
    return faults


def whose_fault(kind: Kind) -> Literal["client", "crowd", "node"]:
    """Whom it happens to; "crowd": to a node that goes on, while a crowd attacks it."""
    return "client" if kind in OF_CLIENTS else "crowd" if kind in OF_CROWDS else "node"
