"""Counters of this process: incremented where something happens, read by `metrics`.

A host has one `Counts`. Whoever wants something counted adds its name here and calls `host.counts.add`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Name: TypeAlias = Literal[
    "sessions_opened",
    "refusals",
    "batches",
    "steps",
    "tokens",
    "failovers",
    "upgrades",
    "audits",
]

# For each name: what its label is called, "" if it has none, and what it means.
MEANINGS: Final[dict[Name, tuple[str, str]]] = {
    "sessions_opened": ("", "Sessions let in."),
    "refusals": ("reason", "Sessions, streams and connections refused or cut off, by why."),
    "batches": ("", "Batches computed; steps by batches is the mean batch size."),
    "steps": ("", "Steps computed."),
    "tokens": ("", "Tokens of those steps."),
    "failovers": ("", "Successors replaced in running sessions."),
    "upgrades": ("", "Links of running sessions that moved from a relay to a direct connection."),
    "audits": ("verdict", "Audits, by how they ended; asked: evidence that auditors wanted of us."),
}


@dataclass(slots=True)
class Traffic:
    """Bytes of all streams of some connections, framing included, before encryption."""

    sent: int = 0
    received: int = 0


class Counts:
    """Numbers that only grow. An addition costs a tenth of a microsecond; any thread may add.

    Attributes:
        counted: By name and label. What every token counts adds to it without a call.
    """

    def __init__(self) -> None:
        self.traffic = {"direct": Traffic(), "relayed": Traffic()}
        self.counted = Counter[tuple[Name, str]]()

    def add(self, name: Name, label: str = "", by: int = 1) -> None:
        """Count something. `label` must be one of few words of ours, never one that a peer chose."""
        self.counted[name, label] += by

    def total(self, name: Name, label: str | None = None) -> int:
        """Count under a name, and under one label of it if that is given."""
        return sum(
            amount
            for (counted, with_label), amount in self.counted.copy().items()
            if counted == name and label in (None, with_label)
        )

    def by_label(self, name: Name) -> dict[str, int]:
        """Counts under a name, by label."""
        return {label: amount for (counted, label), amount in self.counted.copy().items() if counted == name}
