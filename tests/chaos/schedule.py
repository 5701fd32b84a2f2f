"""Which fault happens when, to whom, and for how long: a function of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

Kind: TypeAlias = Literal["kill", "freeze", "leave", "vanish"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

GAP_S: Final = (2.0, 6.0)  # between two faults
LASTS_S: Final[dict[Kind, tuple[float, float]]] = {
    "kill": (1.0, 12.0),  # until the node is started again, as the same peer
    "freeze": (1.0, 15.0),  # between SIGSTOP and SIGCONT
    "leave": (1.0, 8.0),  # after a SIGTERM, until the node is started again
    "vanish": (1.0, 6.0),  # a client killed in the middle of whatever it does, until the next one comes
}
RECOVERY_S: Final = 12.0  # for which who was harmed is left in peace: a start, an announcement
MOST_AT_ONCE: Final = 3  # nodes harmed or recovering; the others cannot always hold every block


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. `target` is a node's number, for "vanish" a client's."""

    at_s: float
    kind: Kind
    target: int
    lasts_s: float


def plan_faults(
    seed: int, duration_s: float, *, nodes: int, clients: int, survivors: Sequence[int]
) -> list[Fault]:
    """The faults of a run, in order.

    Args:
        survivors: Nodes that are frozen now and then but never ended, so that growth in them shows.
    """
    rng = random.Random(seed)
    faults: list[Fault] = []
    busy_until: dict[tuple[bool, int], float] = {}
    at_s = 0.0
    while (at_s := at_s + rng.uniform(*GAP_S)) < duration_s:
        kind = rng.choice(KINDS)
        is_client = kind == "vanish"
        free = [
            target
            for target in range(clients if is_client else nodes)
            if busy_until.get((is_client, target), 0.0) <= at_s
            and (kind in ("freeze", "vanish") or target not in survivors)
        ]
        harmed = sum(until > at_s for (of_client, _), until in busy_until.items() if not of_client)
        lasts_s = rng.uniform(*LASTS_S[kind])
        if not free or (not is_client and harmed >= MOST_AT_ONCE):
            continue
        target = rng.choice(free)
        busy_until[is_client, target] = at_s + lasts_s + RECOVERY_S
        faults.append(Fault(round(at_s, 3), kind, target, round(lasts_s, 3)))
    return faults
